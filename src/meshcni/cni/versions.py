"""The versions of the CNI specification that we speak. Imported by the plugin's fastest path, so it imports nothing."""

SUPPORTED_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")  # oldest first
OLDEST_VERSION = SUPPORTED_VERSIONS[0]  # of a conf that names none
CURRENT_VERSION = SUPPORTED_VERSIONS[-1]


def version_text() -> str:
    """The answer to VERSION: one line of JSON, as containernetworking/cni pkg/version prints it."""
    supported = '","'.join(SUPPORTED_VERSIONS)
    return f'{{"cniVersion":"{CURRENT_VERSION}","supportedVersions":["{supported}"]}}\n'
