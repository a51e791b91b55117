#!/usr/bin/python3 -IS
"""Plays Istio's own plugin for pods outside the mesh: passes the result on, and leaves a note that it was called."""

import json
import os
import sys

command = os.environ["CNI_COMMAND"]
if command == "VERSION":
    print(json.dumps({"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]}))
elif command == "ADD":
    conf = json.load(sys.stdin)
    with open("/run/istio-cni/original-adds", "a", encoding="ascii") as notes:
        notes.write(os.environ["CNI_ARGS"] + "\n")
    print(json.dumps({**conf["prevResult"], "cniVersion": conf["cniVersion"]}))
