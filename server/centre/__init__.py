"""The centre's service: certificates, registered hospitals, the door and Flower's processes."""
