package store

import (
	"cmp"
	"fmt"
	"net/netip"

	"github.com/egret-project/egret/egress"
)

// The keys of the records, without the prefix that a Client puts before them. docs/design.md has the schema.
const (
	PoolPrefix         = "pools/"
	EgressPrefix       = "egresses/"
	AllocationPrefix   = "allocations/"
	IDPrefix           = "ids/"
	MembersByNode      = "members/by-node/"
	MembersByEgress    = "members/by-egress/"
	BlockPrefix        = "blocks/"
	BlockHistoryPrefix = "blocks-history/"
	NodePrefix         = "nodes/"
	ServicePrefix      = "services/"
	PodPrefix          = "pods/"
	AgentPrefix        = "agents/"
	OwnerPrefix        = "owners/"
	MovePrefix         = "moves/"
	PinPrefix          = "pins/"
	CordonPrefix       = "cordons/"
	SuspicionPrefix    = "suspicions/"
	HistoryPrefix      = "history/"
	EventRecordPrefix  = "told/"
	CounterPrefix      = "counters/" // what crdsync gave out last
	ActPrefix          = "acts/"
	PermitKey          = "permit"
	CompactionKey      = "compaction" // when etcd had which revision, crdsync's own record
	CloudPrefix        = "cloud/"
)

// PoolKey is the key of an egress.Pool.
func PoolKey(pool string) string { return PoolPrefix + pool }

// EgressKey is the key of an egress.Policy.
func EgressKey(name string) string { return EgressPrefix + name }

// AllocationKey is the key of an egress.Allocation.
func AllocationKey(ip netip.Addr) string { return AllocationPrefix + ip.String() }

// IDKey is the key of an egress.IDRecord.
func IDKey(id egress.ID) string { return IDPrefix + id.String() }

// MembersByNodeKey is the key under which the node of some pods finds them; egressName may be egress.Unselected.
func MembersByNodeKey(node, egressName string) string {
	return MembersByNode + node + "/" + egressName
}

// MembersByEgressKey is the key under which the gateway of some pods finds them.
func MembersByEgressKey(egressName, node string) string {
	return MembersByEgress + egressName + "/" + node
}

// BlockKey is the key of an egress.Block: with five digits, in the order of the ports.
func BlockKey(ip netip.Addr, first uint16) string {
	return fmt.Sprintf("%s%s/%05d", BlockPrefix, ip, first)
}

// BlockHistoryKey is the key of an egress.BlockTenure. A block that is given back and taken again within a second has
// another beginning.
func BlockHistoryKey(t egress.BlockTenure) string {
	return fmt.Sprintf("%s%s/%05d/%s-%s", BlockHistoryPrefix, t.IP, t.First, t.Until.UTC().Format(blockTime), t.Since.UTC().Format(blockTime))
}

// NodeKey is the key of an egress.Node.
func NodeKey(node string) string { return NodePrefix + node }

// ServiceKey is the key of an egress.ServiceCIDR.
func ServiceKey(name string) string { return ServicePrefix + name }

// PodKey is the key of an egress.PodRanges; node may be egress.AllNodes.
func PodKey(node string) string { return PodPrefix + node }

// AgentKey is the key of an egress.Agent.
func AgentKey(node string) string { return AgentPrefix + node }

// OwnerKey is the key of an egress.Owner.
func OwnerKey(ip netip.Addr) string { return OwnerPrefix + ip.String() }

// MoveKey is the key of an egress.Move.
func MoveKey(ip netip.Addr) string { return MovePrefix + ip.String() }

// PinKey is the key of an egress.Pin.
func PinKey(ip netip.Addr) string { return PinPrefix + ip.String() }

// CordonKey is the key of an egress.Cordon.
func CordonKey(node string) string { return CordonPrefix + node }

// SuspicionKey is the key of an egress.Suspicion.
func SuspicionKey(node string) string { return SuspicionPrefix + node }

// EventRecordKey is the key of crdsync's record of the Events that it has made of an object.
func EventRecordKey(kind, name string) string { return EventRecordPrefix + kind + "/" + name }

// CloudKey is the key of an egress.CloudAddress.
func CloudKey(ip netip.Addr) string { return CloudPrefix + ip.String() }

// HistoryKey is the key of an egress.Tenure. Time and node make it unique; the order of tenures is that of the keys'
// revisions, since the nodes' clocks differ.
func HistoryKey(t egress.Tenure) string {
	return HistoryPrefix + t.IP.String() + "/" + t.Since.UTC().Format("20060102T150405.000000000") + "-" + cmp.Or(t.Node, t.From)
}
