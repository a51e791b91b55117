"""CNI verbs: environment and effects in, an answer out. Whatever happens, there is an answer and never a traceback."""

from meshcni import __version__
from meshcni.cni.versions import SUPPORTED_VERSIONS, version_text
from meshcni.istio import PLUGIN_NAME
from meshcni.plugin.effects import Effects


def run(environ: dict[str, str], effects: Effects) -> tuple[int, str]:
    """Answers the verb in CNI_COMMAND with exit status and stdout.

    DEL always succeeds and looks at nothing: rules live in the pod's netns and go with it, and a sandbox whose DEL
    fails stays forever. VERSION reads no stdin, as the CNI specification wants it.
    """
    command = environ.get("CNI_COMMAND", "")
    if command == "DEL":
        return 0, ""
    if command == "VERSION":
        return 0, version_text()
    if not command:
        versions = ", ".join(SUPPORTED_VERSIONS)
        effects.say(f"CNI plugin {PLUGIN_NAME} {__version__}\nCNI protocol versions supported: {versions}\n")
        return 0, ""
    from meshcni.plugin.add import answer_with_conf  # not loaded by the verbs above, which need no conf

    return answer_with_conf(environ, effects)
