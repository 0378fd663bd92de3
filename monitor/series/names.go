// SPDX-License-Identifier: Apache-2.0
// Copyright The Muster authors

package series

import "strings"

// The metrics of this package. A name is the same in /metrics, in
// /api/v1/metrics and in rules.
const (
	NodeCPU         = "muster_node_cpu_percent"
	NodeLoad1       = "muster_node_load1"
	NodeMemTotal    = "muster_node_memory_bytes"
	NodeMemUsed     = "muster_node_memory_used_bytes"
	NodeMemPercent  = "muster_node_memory_used_percent"
	DiskTotal       = "muster_disk_bytes"
	DiskFree        = "muster_disk_free_bytes"
	DiskPercent     = "muster_disk_used_percent"
	PoolTotal       = "muster_pool_bytes"
	PoolFree        = "muster_pool_free_bytes"
	PoolPercent     = "muster_pool_used_percent"
	NICReceived     = "muster_nic_received_bytes_total"
	NICSent         = "muster_nic_sent_bytes_total"
	NICErrors       = "muster_nic_errors_total"
	VMCPU           = "muster_vm_cpu_percent"
	VMCPUSeconds    = "muster_vm_cpu_seconds_total"
	VMRSS           = "muster_vm_resident_bytes"
	VMMemory        = "muster_vm_memory_bytes"
	VMBalloon       = "muster_vm_balloon_bytes"
	VMDiskRead      = "muster_vm_disk_read_bytes_total"
	VMDiskWritten   = "muster_vm_disk_written_bytes_total"
	RaftLeader      = "muster_raft_leader"
	RaftTerm        = "muster_raft_current_term"
	RaftApplied     = "muster_raft_applied_index"
	RaftCommitted   = "muster_raft_committed_index"
	RaftLag         = "muster_raft_lag_entries"
	RaftApplies     = "muster_raft_applies_total"
	RaftApplySum    = "muster_raft_apply_seconds_total"
	RaftApply       = "muster_raft_apply_seconds"
	ReplicaRevision = "muster_replica_revision"
	ReplicaAge      = "muster_replica_staleness_seconds"
	LeaseRemaining  = "muster_lease_remaining_seconds"
	GossipMembers   = "muster_gossip_members"
	ServiceUp       = "muster_service_up"
	ServiceRestarts = "muster_service_restarts_total"
	CollectorUp     = "muster_collector_up"
	CollectorTime   = "muster_collector_duration_seconds"
	AgentRequests   = "muster_snmp_requests_total"
	AgentRefused    = "muster_snmp_refused_total"
)

var help = map[string]string{
	NodeCPU: "Share of all CPUs of the host that is busy.", NodeLoad1: "Load average of one minute.",
	NodeMemTotal: "Memory of the host.", NodeMemUsed: "Memory that is not available.", NodeMemPercent: "Share of the memory that is not available.",
	DiskTotal: "Size of the file system.", DiskFree: "Free bytes for the daemon.", DiskPercent: "Used share of the file system.",
	PoolTotal: "Size of the pool's file system.", PoolFree: "Free bytes of the pool.", PoolPercent: "Used share of the pool.",
	NICReceived: "Bytes received.", NICSent: "Bytes sent.", NICErrors: "Errors and drops, both ways.",
	VMCPU: "CPU time of QEMU; 100 is one CPU.", VMCPUSeconds: "CPU time of QEMU.", VMRSS: "Memory of the host that QEMU holds.",
	VMMemory: "Memory of the guest as configured.", VMBalloon: "Memory that the balloon leaves to the guest.",
	RaftLeader: "1 on the leader.", RaftTerm: "Raft term.", RaftApplied: "Last applied entry.", RaftCommitted: "Last entry known as committed.",
	RaftApplies: "Entries applied since the daemon began.", RaftApplySum: "Time that took.", RaftApply: "Mean time of applying an entry, of those since the last look.",
	VMDiskRead: "Bytes that the guest read from its disks, as QEMU counts.", VMDiskWritten: "Bytes that the guest wrote to its disks, as QEMU counts.",
	RaftLag: "Entries committed and not yet applied.", ReplicaRevision: "Revision that this node has applied.", ReplicaAge: "How old this replica may be.",
	LeaseRemaining: "Seconds that this node's lease is still valid; negative when it is not.",
	GossipMembers:  "Nodes by their state as gossip has it here: a hint.",
	ServiceUp:      "1 while the service runs.", ServiceRestarts: "Restarts since the daemon began.",
	CollectorUp: "1 if the last run ended in time and without an error.", CollectorTime: "Duration of the last run.",
	AgentRequests: "Requests that the SNMP agent answered.", AgentRefused: "Requests that the SNMP agent did not answer, by reason.",
}

// describe returns help and type of a metric.
func describe(name string) (text, typ string) {
	typ = "gauge"
	if strings.HasSuffix(name, "_total") {
		typ = "counter"
	}
	return help[name], typ
}
