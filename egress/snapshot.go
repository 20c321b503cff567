package egress

import (
	"net/netip"
	"time"
)

// Snapshot is what etcd says, as one agent sees it. Maps may be nil; nothing in a Snapshot may be changed by who reads
// it.
type Snapshot struct {
	Revision int64
	// Restores counts how often an answer of etcd has shown this process that etcd is another one than before, as after
	// a restore.
	Restores int
	// Longest is the longest P of the agents, as the record permit has it; 0: there is none.
	Longest  time.Duration
	Pools    map[string]Pool
	Egresses map[string]Policy
	Nodes    map[string]Node
	Services map[string]ServiceCIDR
	// Pods are the pods' addresses outside of their nodes' PodCIDRs, by node; AllNodes may be one of the names.
	Pods   map[string]PodRanges
	Agents map[string]Agent
	Owners map[netip.Addr]Owner
	// Partial: Owners has those of some egress IPs alone, so one without an owner there may have one.
	Partial bool
	Moves   map[netip.Addr]Move
	Pins    map[netip.Addr]Pin
	Cordons map[string]Cordon
	// Suspicions are by the node of the agent that they are against.
	Suspicions map[string]Suspicion
	// ByNode holds the members of this node: egress name -> members. Unselected may be one of the names.
	ByNode map[string]Members
	// ByEgress holds the members of the egresses that were asked for: egress name -> node name -> members.
	ByEgress map[string]map[string]Members
	// Followed are the egresses of which ByEgress is whole. One that was asked for just now is not among them yet.
	Followed map[string]bool
	// Faults are the records that could not be read, by key without the prefix, sorted by key. Where an earlier value
	// of the key could be read, that one still stands in the maps above.
	Faults []Fault
}

// Fault is one record that could not be read.
type Fault struct {
	Key string
	Err error
	// Blind: it was so from the first snapshot on. What is in the kernel from before may be of this record, and nobody
	// can tell.
	Blind bool
}
