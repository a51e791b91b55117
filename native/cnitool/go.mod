// libcni's own command line, to drive our plugin the way container runtimes do. Built by scripts/build-cnitool.
module meshcni.test/cnitool

go 1.24

tool github.com/containernetworking/cni/cnitool

require github.com/containernetworking/cni v1.3.0 // indirect
