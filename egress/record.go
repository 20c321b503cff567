package egress

import (
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// The records below are the JSON values in etcd; the key of each is in its comment, without the prefix. Unknown fields
// are ignored when read, so that a newer writer does not stop an older reader.

// Pool is pools/<pool>: an ExternalIPPool.
type Pool struct {
	Name string `json:"name"`
	// UID is that of the object: one that was deleted and made anew has another.
	UID    string  `json:"uid,omitempty"`
	Ranges []Range `json:"ranges"`
	// Subnet is nil when the pool's addresses are in the subnet of the nodes.
	Subnet *Subnet `json:"subnet,omitempty"`
	// NodeSelector says which nodes may hold the pool's addresses. The zero Selector selects every node.
	NodeSelector Selector `json:"nodeSelector"`
}

// Subnet is where the addresses of a pool live when that is not the subnet of the nodes.
type Subnet struct {
	Gateway      netip.Addr `json:"gateway"`
	PrefixLength int        `json:"prefixLength"`
	// VLAN is the VLAN id, 1..4094; 0 means untagged.
	VLAN int `json:"vlan,omitempty"`
}

// Prefix returns the addresses of the subnet; the zero Prefix where the record makes no sense.
func (s Subnet) Prefix() netip.Prefix {
	p, err := s.Gateway.Prefix(s.PrefixLength)
	if err != nil {
		return netip.Prefix{}
	}
	return p
}

// Policy is egresses/<egress>: an Egress and the addresses that were allocated to it.
type Policy struct {
	Name string `json:"name"`
	// Addresses holds at most one address per family. Empty: none is allocated (yet), and the traffic of the pods is
	// dropped.
	Addresses []Address `json:"addresses"`
	// Former are addresses that it had of a pool that it still names, and lost with the pool: it gets them again when
	// they are back. They are for crdsync alone.
	Former     []Address  `json:"former,omitempty"`
	Bandwidth  *Bandwidth `json:"bandwidth,omitempty"`
	Created    time.Time  `json:"created"`
	Generation int64      `json:"generation"`
}

// Address is one egress IP of a Policy.
type Address struct {
	IP netip.Addr `json:"ip"`
	ID ID         `json:"id"`
	// Pool is empty for a static egress IP: a node's own address, which Egret neither adds nor removes.
	Pool string `json:"pool,omitempty"`
}

// Bandwidth limits the traffic of an egress IP in request direction.
type Bandwidth struct {
	Rate  int64 `json:"rate"`  // bits per second
	Burst int64 `json:"burst"` // bits
}

// Allocation is allocations/<ip>: the IP is taken. It is created by a transaction that requires its absence.
type Allocation struct {
	IP   netip.Addr `json:"ip"`
	Pool string     `json:"pool,omitempty"`
	// PoolUID is that of the pool that the IP was given out from, or that has it since.
	PoolUID string `json:"poolUID,omitempty"`
	ID      ID     `json:"id"`
	// Egresses are the names of those that use the IP, sorted. More than one only for static IPs.
	Egresses []string  `json:"egresses"`
	Since    time.Time `json:"since"`
}

// IDRecord is ids/<id>: which IP the id belongs to.
type IDRecord struct {
	ID ID         `json:"id"`
	IP netip.Addr `json:"ip"`
}

// Members is members/by-node/<node>/<egress> and members/by-egress/<egress>/<node>: the pods of one egress on one node.
// Both keys hold the same value and change in one transaction.
type Members struct {
	Egress string   `json:"egress"`
	Node   string   `json:"node"`
	Pods   []Member `json:"pods"` // sorted by Pod
	// Blocks are the ports of the egress's IPs that are this node's, sorted by IP and first port. Where an IP has none,
	// its gateway translates.
	Blocks []Block `json:"blocks,omitempty"`
}

// Member is one pod of an egress.
type Member struct {
	Pod string       `json:"pod"` // namespace/name
	IPs []netip.Addr `json:"ips"` // sorted
	// Also are further egresses whose appliedTo selects the pod and that come later, in their order: the first
	// MaxAlso. They do not apply to it.
	Also []string `json:"also,omitempty"`
}

// MaxAlso bounds Member.Also: an egress for everything selects what all others do.
const MaxAlso = 3

// Unselected is the name that stands for "no egress" in members/by-node/<node>/-.
const Unselected = "-"

// Node is nodes/<node>: a Kubernetes node.
type Node struct {
	Name string `json:"name"`
	// Index numbers the node, 1..MaxNodeIndex, stable while the node exists: it is in a PeerMark and in an
	// OverlaySource.
	Index int `json:"index"`
	// Addresses are the node's InternalIPs, the primary one first. The first of each family is the node's overlay
	// endpoint.
	Addresses []netip.Addr `json:"addresses"`
	// PodCIDRs are what the node's pods get their IPs from. Empty when the CNI does not say.
	PodCIDRs []netip.Prefix    `json:"podCIDRs,omitempty"`
	Labels   map[string]string `json:"labels,omitempty"`
	// Capacity is the largest number of egress IPs that the node may hold; 0 means no limit of its own.
	Capacity int  `json:"capacity,omitempty"`
	Cordoned bool `json:"cordoned,omitempty"`
}

// ServiceCIDR is services/<name>: a Kubernetes ServiceCIDR. Destinations in it are never SNATed.
type ServiceCIDR struct {
	Name  string         `json:"name"`
	CIDRs []netip.Prefix `json:"cidrs"`
}

// PodRanges is pods/<node>: the addresses of the node's pods that are not of its PodCIDRs. It is there, and may be
// empty, for every node without PodCIDRs. pods/- are the ranges of --cluster-cidrs of crdsync, which are of all nodes.
// Destinations in them are never SNATed.
type PodRanges struct {
	Node string `json:"node"`
	// CIDRs cover the addresses, and no others: what is beside a pod may be outside the cluster.
	CIDRs []netip.Prefix `json:"cidrs"`
}

// AllNodes is the name that stands for every node in pods/-.
const AllNodes = "-"

// Agent is agents/<node>, under the agent's lease: the node's agent is alive.
type Agent struct {
	Node string `json:"node"`
	// Address and MAC are the overlay endpoint, for the operator's eyes: peers compute them from the node's record.
	Address netip.Addr `json:"address"`
	MAC     string     `json:"mac"`
	// Lease is the etcd lease id, hexadecimal as etcdctl prints it. The next agent of the node adopts it.
	Lease    string    `json:"lease"`
	Version  string    `json:"version"`
	Features []string  `json:"features,omitempty"` // what the kernel can do
	Since    time.Time `json:"since"`
	// Faults are what the node could not program for a while, by part: addresses, conntrack, fast path, nftables, node,
	// permits, pods, routes, uplink.
	Faults map[string]string `json:"faults,omitempty"`
	// Conflicts are the egress IPs that a host outside the cluster uses, as far as this node heard, and which: those
	// that the node has not claimed for that reason, and those that it holds.
	Conflicts map[netip.Addr]string `json:"conflicts,omitempty"`
	// Dropped are the egress IPs of which the node has dropped packets for a while since they were about to leave with
	// another source, or by another way, and why that may be.
	Dropped map[netip.Addr]string `json:"dropped,omitempty"`
	// Refused are the pools whose IPs the node cannot hold, and why: a VLAN id that another link has, a kernel without
	// VLANs.
	Refused map[string]string `json:"refused,omitempty"`
	// Ports is what the node has to say of its blocks of ports, by egress IP.
	Ports map[netip.Addr]PortUse `json:"ports,omitempty"`
	// Ready says that the node's kernel was programmed as a whole, once: by this agent, or by one before whose lease it
	// has adopted.
	Ready bool `json:"ready,omitempty"`
	// Exposed says why the agent does not speak to etcd by mTLS (--insecure). Empty: it does, or an older agent does
	// not say.
	Exposed string `json:"exposed,omitempty"`
	// Permit is how long the permits of the agent's kernel may be, P. Empty: an older agent does not say.
	Permit Duration `json:"permit,omitempty"`
	// Restarting is set by an agent that stops and expects a successor, in the write that moves it to another lease. It
	// is given no IP until the successor has taken over.
	Restarting bool `json:"restarting,omitempty"`
	// Promises says that the agent has gossip, and promises to take no IP when it is asked while etcd is lost. An older
	// agent does not say; it does when it is Revocable.
	Promises bool `json:"promises,omitempty"`
	// Revocable says that the agent's permits end within one permit length of its last look at this record, whoever
	// revokes its lease: peers may do that when the gossip reports it dead. An agent that stops moves its keys to a
	// lease that is not.
	Revocable bool `json:"revocable,omitempty"`
	// Suspectable says that the agent ends a Suspicion against it before it takes etcd's answers for a yes. Without it,
	// and Revocable, peers do not revoke its lease.
	Suspectable bool `json:"suspectable,omitempty"`
}

// Suspicion is suspicions/<node>: a peer has heard by the gossip that the agent of the node is dead. An agent that
// lives ends it, by deleting the record, before it takes any of etcd's answers for a yes. So while it stands the
// agent's permits end, at the latest P after it was written. A suspicion that stays means that the agent is dead, or
// partitioned from etcd.
type Suspicion struct {
	Node  string    `json:"node"`
	Lease string    `json:"lease"` // the agent's
	By    string    `json:"by"`    // the peer's node
	Since time.Time `json:"since"`

	// Revision is the key's mod revision.
	Revision int64 `json:"-"`
}

// Permits is permit: the longest P that an agent may have. Who claims the IP of an owner that was lost waits that long.
type Permits struct {
	Longest Duration `json:"longest"`
}

// CloudAddress is cloud/<ip>: an egress IP that Egret assigned to a network interface in a cloud, or is about to.
// Without it an address of a cloud is somebody else's. It stays until the cloud says that nobody has the address any
// more.
type CloudAddress struct {
	IP netip.Addr `json:"ip"`
	// Asked are the interfaces, as the cloud names them, that the address was first asked for, while it is not known
	// whether that came about: on them it is Egret's. Empty: it is Egret's wherever it is.
	Asked []string `json:"asked,omitempty"`
}

// Egrets reports whether Egret assigned the address to the interface that has it.
func (c CloudAddress) Egrets(holder string) bool {
	return len(c.Asked) == 0 || slices.Contains(c.Asked, holder)
}

// Duration is a length of time, in text as Go writes it: 500ms.
type Duration time.Duration

// Is compares it with one.
func (d Duration) Is(t time.Duration) bool { return time.Duration(d) == t }

// MarshalText writes it.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what MarshalText writes; it is longer than nothing.
func (d *Duration) UnmarshalText(b []byte) error {
	t, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	if t <= 0 {
		return fmt.Errorf("duration %s: want more than 0", b)
	}
	*d = Duration(t)
	return nil
}

// Owner is owners/<ip>, under the owner's lease: the lock of one egress IP.
type Owner struct {
	IP    netip.Addr `json:"ip"`
	Node  string     `json:"node"`
	Since time.Time  `json:"since"`
	Why   Reason     `json:"why"`
	// From is the node that handed the IP over, in a planned move, or gave it up: it stopped answering for the IP
	// before the record was written, so the new owner has nothing to wait for.
	From string `json:"from,omitempty"`
	// Suspicion is the revision of the Suspicion that stood against the former owner when its lock ended: it got no yes
	// from etcd after that. 0: none did.
	Suspicion int64 `json:"suspicion,omitempty"`

	// Lease and Revision come with the key, not with its value. Revision is the key's mod revision: the fencing token.
	Lease    int64 `json:"-"`
	Revision int64 `json:"-"`
}

// Reason says why an owner holds an IP.
type Reason string

// The reasons.
const (
	ReasonClaim  Reason = "claim"  // nobody held it
	ReasonStatic Reason = "static" // the address is on one of the node's interfaces
	ReasonMove   Reason = "move"   // handed over by its former owner, as the operator asked
	// ReasonDrain and ReasonRebalance: handed over too, because the former owner is cordoned, or because the IP belongs
	// here.
	ReasonDrain     Reason = "drain"
	ReasonRebalance Reason = "rebalance"
	// ReasonRelease is that of a Tenure of nobody: the former owner gave the IP back, since it might not or could not
	// serve it.
	ReasonRelease Reason = "release"
	// ReasonCrash is what a history says for ReasonClaim when the former owner had not given the IP back: its lease
	// ended.
	ReasonCrash Reason = "crash"
)

// Tenure is history/<ip>/<when>-<node>: from when on a node held an egress IP, or nobody did, and why. It is written in
// the transaction that changes the owner.
type Tenure struct {
	IP    netip.Addr `json:"ip"`
	Node  string     `json:"node,omitempty"` // empty: nobody
	Since time.Time  `json:"since"`
	Why   Reason     `json:"why"`
	From  string     `json:"from,omitempty"` // who held it before, where the writer knew
	By    string     `json:"by,omitempty"`   // who asked for it, of a Move
}

// Move is moves/<ip>: a planned move was asked for, by the operator or by the owner. The record is bound to a lease of
// its writer, so that it does not outlive the writer's patience.
type Move struct {
	IP    netip.Addr `json:"ip"`
	To    string     `json:"to"`
	Since time.Time  `json:"since"`
	// Ready is set by the target once its kernel is programmed; the owner then hands over. ReadyLease is the lease of
	// the target's agent, as in its record: an agent that was restarted since gets ready anew. Empty: the agent is one
	// that does not say.
	Ready      bool   `json:"ready,omitempty"`
	ReadyLease string `json:"readyLease,omitempty"`
	// Why is what the next owner's record says; empty: ReasonMove.
	Why Reason `json:"why,omitempty"`
	// By is the person who asked, as Act.By, of a drain who cordoned the node; empty: the owner's agent.
	By string `json:"by,omitempty"`
	// Force lets the target take more IPs than it may hold.
	Force bool `json:"force,omitempty"`

	Lease    int64 `json:"-"`
	Revision int64 `json:"-"`
}

// ReadyAt reports whether the target is ready, with the agent that it has.
func (m Move) ReadyAt(to Agent) bool {
	return m.Ready && (m.ReadyLease == "" || m.ReadyLease == to.Lease)
}

// Pin is pins/<ip>: the operator wants this IP on that node for good.
type Pin struct {
	IP   netip.Addr `json:"ip"`
	Node string     `json:"node"`
}

// Cordon is cordons/<node>: the node gives its IPs away and takes none.
type Cordon struct {
	Node  string    `json:"node"`
	Since time.Time `json:"since"`
	Why   string    `json:"why,omitempty"`
	By    string    `json:"by,omitempty"` // the person who cordoned it, as Act.By; empty: an older command does not say
}

// Act is acts/<when>-<what>-<whom>: a person did something with an egress command. It is written in the transaction
// that does it, and kept for 90 days.
type Act struct {
	What Deed       `json:"what"`
	IP   netip.Addr `json:"ip,omitzero"`    // it is about
	Node string     `json:"node,omitempty"` // it is about, or the target
	// By is who did it, as the command that he used says: user and host, and the name in the certificate that it showed
	// to etcd.
	By    string    `json:"by"`
	Since time.Time `json:"since"`
}

// Deed is what a person did.
type Deed string

// The deeds.
const (
	ActMove     Deed = "move" // asked for it: the history of the IP says whether it came true
	ActPin      Deed = "pin"
	ActUnpin    Deed = "unpin"
	ActCordon   Deed = "cordon"
	ActUncordon Deed = "uncordon"
	ActDrain    Deed = "drain"
)
