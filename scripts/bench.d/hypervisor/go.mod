module github.com/muster-vm/muster/scripts/bench.d/hypervisor

go 1.26.0

require github.com/muster-vm/muster/scripts/bench.d/configdb v0.0.0

replace github.com/muster-vm/muster/scripts/bench.d/configdb => ../configdb
