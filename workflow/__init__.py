"""The stages of the open-r1-pipeline and the commands around them."""
