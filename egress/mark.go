package egress

import (
	"fmt"
	"strconv"
)

// ID numbers one egress IP, 1..65535; IPv4 and IPv6 addresses have ids of their own. It is what crosses the cluster in
// place of addresses: a packet of an egress connection carries it as its mark, and between nodes as the VXLAN group
// policy id. The zero ID means "no address yet": its connections are dropped.
type ID uint16

// MaxID is the largest ID: the 16 bits of a group policy id.
const MaxID ID = 1<<16 - 1

// Mark is a packet mark (fwmark) or a connection mark, in host byte order.
type Mark uint32

// The numbers reserved in the kernel. docs/design.md has the table and the reasons.
const (
	// MarkMask covers the bits of the packet mark that are Egret's: 0x4000 and 0x8000 are kube-proxy's, 0xffff0000
	// Calico's.
	MarkMask Mark = 0x3fff
	// RoutingBit is in every routing mark, and where a packet is routed in no other mark of ours without IDBit.
	RoutingBit Mark = 0x2000
	// IDBit tells an ID that comes out of the overlay, or goes there, from a routing mark: VXLAN has it as the bit A of
	// its group policy (linux: VXLAN_GBP_POLICY_APPLIED).
	IDBit Mark = 0x80000
	// RuleMask covers the bits of the packet mark by which a packet is routed.
	RuleMask = MarkMask | IDBit
	// LocalMark means "leave from here, by the main table". No ip rule matches it.
	LocalMark Mark = MarkMask
	// ConnTag is what the upper half of the connection mark of an egress connection is; the ID is the lower one.
	// Another program's connection marks are so never taken for Egret's.
	ConnTag Mark = 0x0e9e0000
	// ConnTagMask covers the bits of the connection mark that hold ConnTag.
	ConnTagMask Mark = 0xffff0000

	// RenewalMark and RenewalMask mark the frames that renew permits. They live on `lo` and end where they have done
	// it, before the route lookup.
	RenewalMark, RenewalMask Mark = 0xe9000000, 0xff000000

	// ToGatewayMark routes what a pod sends, and its node has translated, into the overlay: to which gateway is said on
	// the way out (PeerMark).
	ToGatewayMark = LocalMark - 1
	// ToNodeMark routes what comes from outside for a pod of another node into the overlay, likewise.
	ToNodeMark = LocalMark - 2

	// FirstTable is the route table of RoutingBit. Table FirstTable+n belongs to the routing mark RoutingBit+n.
	FirstTable = 7000
	// ClosePriority is that of the rule by which what comes out of the overlay goes nowhere as long as it has the id as
	// its mark that it came with: the nftables tables would have given it another, and somebody has flushed them. It is
	// no rule for packets without any mark: where the kernel looks for the way back to a packet's source, it looks as
	// if that way came out of the overlay.
	ClosePriority = 1000
	// SelfPriority is the priority of the ip rules for what the node itself has to say of a packet of another node's
	// pod: that goes to that node, whether the packet's source is an OverlaySource or an egress IP that is an address
	// of this node. AddressPriority is that of the rule by which such an IP is local for all else without the routing
	// bit. Those of egress IPs are there only while the node has such addresses.
	SelfPriority, AddressPriority = 1001, 1002
	// GuardPriority is the priority of the ip rule that takes every packet without a mark of ours past the others, to
	// the last one.
	GuardPriority = 1003
	// OthersPriority is that of the rule that takes the rest without the routing bit, which others have marked, past
	// the last rules.
	OthersPriority = 1100
	// LastPriority is the priority of the ip rule of ToNodeMark. It is the last of ours: the guard leads to it, and
	// from there a packet that is not ours comes to the rules of others. (A guard that led to the main table would skip
	// those.)
	LastPriority = MaxPriority
	// AddressTable is the route table in which the egress IPs that are addresses of the node are local: after the
	// marks, in place of the kernel's own table, which comes before all marks.
	AddressTable = FirstTable + int((LocalMark-3)&^RoutingBit)
	// ClosedTable is the route table that leads nowhere.
	ClosedTable = FirstTable + int(LocalMark&^RoutingBit)
	// ExitPriority is the priority that the ip rules of all other routing marks share: their marks differ, so their
	// order is of no meaning.
	ExitPriority = 1200
	// MinPriority and MaxPriority bound the ip rule priorities that are Egret's; what lies between the ones above is
	// free for the operator, as long as its protocol is not RouteProtocol.
	MinPriority, MaxPriority = 1000, 1999
	// RouteProtocol marks the routes and rules that are Egret's (rtm_protocol, see /etc/iproute2/rt_protos).
	RouteProtocol = 94

	// OverlayPort is the UDP port of the overlay.
	OverlayPort = 8479
	// OverlayVNI is the VXLAN network identifier of the overlay.
	OverlayVNI = 7
	// OverlayLink names the VXLAN link between a pod's node and the gateway.
	OverlayLink = "egret.vx"
	// AddressLink names the link, always down, that carries the addresses of the egress IPs hosted in the default
	// subnet.
	AddressLink = "egret0"
	// VLANLinkPrefix begins the names of the VLAN links; the VLAN id follows.
	VLANLinkPrefix = "egret."
	// TableName names the nftables tables: `table inet egret`, `table arp egret`, `table netdev egret`.
	TableName = "egret"
	// TraceTableName names the table that is there while packets are followed (nft.Trace), of a socket of its own.
	TraceTableName = TableName + "-trace"
	// TranslatePriority is that of the chain that translates, the first that the kernel takes for NAT (linux:
	// nft_chain_parse_hook wants it after conntrack's, -200). All of NAT runs at 100, by these priorities: iptables at
	// 100, kindnet at 90. Of two with the same the later one is called first.
	TranslatePriority = -199
	// StatusPort is the TCP port of metrics and health of the agent; SyncStatusPort is that of crdsync, CloudStatusPort
	// that of the controller of a cloud's addresses: they may be on the same node. The bundled etcd has those in
	// between.
	StatusPort, SyncStatusPort, CloudStatusPort = 8481, 8482, 8486
	// PagePort is the TCP port of the status page, on loopback.
	PagePort = 8487
	// EtcdRelayPort is the TCP port on loopback by which crdsync passes connections on to etcd.
	EtcdRelayPort = 8488
)

// MaxNodeIndex is the largest Node.Index: 16 bits, in a PeerMark and in an OverlaySource.
const MaxNodeIndex = 1<<16 - 1

const (
	// firstSubnet is the lowest of the routing marks for subnets, without RoutingBit: those below were of nodes once.
	firstSubnet = 0x1000
	// SubnetMarks is how many routing marks there are for subnets: up to those of the overlay and AddressTable.
	SubnetMarks = int(LocalMark-RoutingBit) - firstSubnet - 3
)

// SubnetMark returns the n-th routing mark for subnets, n from 0 to SubnetMarks-1.
func SubnetMark(n int) Mark { return RoutingBit + firstSubnet + Mark(n) }

// IsSubnet reports whether the mark is a SubnetMark.
func (m Mark) IsSubnet() bool { return m >= SubnetMark(0) && m < SubnetMark(SubnetMarks) }

// ConnMark returns the connection mark of the connections of id.
func (id ID) ConnMark() Mark { return ConnTag | Mark(id) }

// String returns the decimal number, as in the etcd key ids/<id>.
func (id ID) String() string { return strconv.Itoa(int(id)) }

// ParseID parses what String returns. An error names s.
func ParseID(s string) (ID, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 || ID(n) > MaxID {
		return 0, fmt.Errorf("parsing egress id %q: want a number from 1 to %d", s, MaxID)
	}
	return ID(n), nil
}

// PeerMark is what a packet carries from its SNAT until it leaves by the overlay link: the Node.Index of the node that
// it is for in the upper half, below it the id that it is to have in the overlay.
func PeerMark(index int) Mark { return Mark(index) << 16 }

// PeerMask covers the part of a PeerMark that says the node.
const PeerMask Mark = 0xffff0000

// Table returns the route table that belongs to a routing mark other than LocalMark.
func (m Mark) Table() int { return FirstTable + int(m&^RoutingBit&MarkMask) }

// String prints the mark as nft and ip print it.
func (m Mark) String() string { return fmt.Sprintf("0x%x", uint32(m)) }
