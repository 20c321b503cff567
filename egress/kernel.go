package egress

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
)

// KernelQuestion asks an agent what its node's kernel has for a pod and an egress IP.
type KernelQuestion struct {
	Pod netip.Addr // an address of the pod; the zero Addr: the node is asked as the gateway alone
	IP  netip.Addr // the egress IP, of the family of Pod; the zero Addr: none that is known applies to the pod
	ID  ID         // of that egress IP; 0: there is none
	// Peer is the Node.Index of the node at the other end of the overlay: the gateway, where the pod's node is asked,
	// and that node, where the gateway is. 0: there is none.
	Peer int
	// To is where the packets are for, of the family of IP and Pod; the zero Addr: anywhere outside.
	To netip.Addr
	// Protocol is theirs, by the number that IP has for it; 0: any. Port is that of To, of TCP, UDP or SCTP; 0: any.
	Protocol byte
	Port     uint16
}

// ToOne reports whether the question is about one destination, for which ports of the egress IP are counted.
func (q KernelQuestion) ToOne() bool {
	return q.To.IsValid() && HasPorts(q.Protocol, q.To) && (q.Port != 0 || !takesPort(q.Protocol))
}

func takesPort(protocol byte) bool { return protocol == 6 || protocol == 17 || protocol == 132 }

// Query returns the question as parameters of a request.
func (q KernelQuestion) Query() url.Values {
	v := url.Values{}
	if q.IP.IsValid() {
		v.Set("ip", q.IP.String())
		v.Set("id", strconv.Itoa(int(q.ID)))
	}
	if q.Pod.IsValid() {
		v.Set("pod", q.Pod.String())
	}
	if q.Peer != 0 {
		v.Set("peer", strconv.Itoa(q.Peer))
	}
	if q.To.IsValid() {
		v.Set("to", q.To.String())
	}
	if q.Protocol != 0 {
		v.Set("protocol", strconv.Itoa(int(q.Protocol)))
	}
	if q.Port != 0 {
		v.Set("port", strconv.Itoa(int(q.Port)))
	}
	return v
}

// ParseKernelQuestion reads what Query wrote. Anybody may have written it.
func ParseKernelQuestion(v url.Values) (q KernelQuestion, err error) {
	var errs []error
	if v.Has("ip") || v.Has("id") || v.Get("pod") == "" {
		if q.IP, err = netip.ParseAddr(v.Get("ip")); err != nil || q.IP.Zone() != "" || q.IP.Is4In6() {
			errs = append(errs, fmt.Errorf("ip %.50q: want an egress IP", v.Get("ip")))
		}
		id, err := strconv.ParseUint(v.Get("id"), 10, 16)
		if q.ID = ID(id); err != nil || id == 0 {
			errs = append(errs, fmt.Errorf("id %.50q: want the id of an egress IP, 1 to %d", v.Get("id"), MaxID))
		}
	}
	first := q.IP // all are of its family
	for _, of := range []struct {
		name string
		ip   *netip.Addr
	}{{"pod", &q.Pod}, {"to", &q.To}} {
		if text := v.Get(of.name); text != "" {
			*of.ip, err = netip.ParseAddr(text)
			if !first.IsValid() {
				first = *of.ip
			}
			if ip := *of.ip; err != nil || ip.Zone() != "" || ip.Is4In6() || ip.Is4() != first.Is4() {
				errs = append(errs, fmt.Errorf("%s %.50q: want an address of the family of the egress IP", of.name, text))
			} else if !ip.IsGlobalUnicast() {
				errs = append(errs, fmt.Errorf("%s %.50q: want an address of one host, of no link alone", of.name, text))
			}
		}
	}
	if text := v.Get("peer"); text != "" {
		if q.Peer, err = strconv.Atoi(text); err != nil || q.Peer < 1 || q.Peer > MaxNodeIndex {
			errs = append(errs, fmt.Errorf("peer %.50q: want the index of a node, 1 to %d", text, MaxNodeIndex))
		}
	}
	if text := v.Get("protocol"); text != "" {
		n, err := strconv.ParseUint(text, 10, 8)
		if q.Protocol = byte(n); err != nil {
			errs = append(errs, fmt.Errorf("protocol %.50q: want its number, 0 to 255", text))
		}
	}
	if text := v.Get("port"); text != "" {
		n, err := strconv.ParseUint(text, 10, 16)
		if q.Port = uint16(n); err != nil || n != 0 && !takesPort(q.Protocol) {
			errs = append(errs, fmt.Errorf("port %.50q: want one of TCP, UDP or SCTP, or 0", text))
		}
	}
	return q, errors.Join(errs...)
}

// Kernel is what the kernel of a node has for a pod and an egress IP, read there when its agent was asked. Pods, next
// hops and blocks are those that the agent wants the kernel to have, and Differs says what of all that it wants the
// kernel has not.
type Kernel struct {
	Node string `json:"node"`
	// Watching: the agent follows the changes in etcd at present; else the kernel has what it was told before.
	Watching bool `json:"watching"`
	// Differs are the changes that would make the kernel as the agent wants it, and damages of its tables: at most
	// MaxDiffers, of all there are.
	Differs  []string `json:"differs,omitempty"`
	Differed int      `json:"differed,omitempty"`
	// Permit is how long the permit to send with the egress IP still lasts, in seconds; 0: there is none. Answers: it
	// is one to answer for it, too.
	Permit  float64 `json:"permit_seconds"`
	Answers bool    `json:"answers"`
	// PodID is the id that packets of the pod get; 0: it is no pod of an egress IP here.
	PodID ID `json:"pod_id,omitempty"`
	// Steered: connections of the id have a next hop; without it their packets are dropped. Gateway is the index of
	// the node that they go to, 0: they leave here.
	Steered bool `json:"steered"`
	Gateway int  `json:"gateway_index,omitempty"`
	// Excepted is what the destination of the question is in that no egress applies to: packets of the pod to there
	// leave as those of other pods do. The zero Prefix: nothing, no destination was asked for, or the agent is of an
	// older version.
	Excepted netip.Prefix `json:"excepted,omitzero"`
	// First, Ports and PortsUsed are the block of ports that new connections get theirs of, and how many were in use
	// to one destination when that was last counted. Ports 0: there is no block.
	First     uint16 `json:"first_port,omitempty"`
	Ports     int    `json:"ports,omitempty"`
	PortsUsed int    `json:"ports_used,omitempty"`
	// UsedTo is how many ports of that block are in use to the destination of the question, right now; nil: the
	// question is not about one (KernelQuestion.ToOne), or the agent is of an older version.
	UsedTo *int `json:"ports_used_to,omitempty"`
	// Connections are those of the pod with the id that conntrack has.
	Connections int `json:"connections"`
	// Guarded is how long ago, in seconds, the guard dropped a packet of the id; negative: not within the last half
	// minute.
	Guarded float64 `json:"guarded_seconds"`
	// Dropped are the packets that all of the node's tables dropped, of any pod, by reason (nft.Counter).
	Dropped map[string]uint64 `json:"dropped_packets,omitempty"`
	// Path is the way on from the node; the zero Path: an agent of an older version does not tell.
	Path Path `json:"path,omitzero"`
}

// Path is the way of the pod's packets on from a node, by its kernel's rules and routes.
type Path struct {
	// Overlay is the next hop toward the underlay address of KernelQuestion.Peer; nil: no peer was asked for.
	Overlay *Hop `json:"overlay,omitempty"`
	// Diverted says where rules and routes of others lead packets that Egret's would send into the overlay, or out by
	// the link of a subnet; empty: nowhere else.
	Diverted string `json:"diverted,omitempty"`
	// Exit is the next hop out of the cluster, where packets of the egress IP leave from the node; nil: they do not, or
	// there is no default route and no destination was asked for.
	Exit *Hop `json:"exit,omitempty"`
	// OverlayMTU is the MTU of the overlay link: the largest packet, in bytes, that the node puts into it; 0: there is
	// no such link. PodMTU is that of the link to the pod, 0: it was not asked for, or there is none.
	OverlayMTU int `json:"overlay_mtu,omitempty"`
	PodMTU     int `json:"pod_mtu,omitempty"`
	// Unread says what of all this could not be found out; empty: nothing.
	Unread string `json:"unread,omitempty"`
}

// Hop is the neighbour that a node sends packets to.
type Hop struct {
	To   netip.Addr `json:"to,omitzero"`    // what the route was looked up for
	Via  netip.Addr `json:"via,omitzero"`   // the neighbour: To, or a router on the way there
	Link string     `json:"link,omitempty"` // that leads to it
	// MTU is the largest packet, in bytes, that link and route take; a path MTU that the kernel has learnt counts.
	MTU int `json:"mtu,omitempty"`
	// Down says why the link carries nothing: "down", or "without a carrier"; empty: it does.
	Down string `json:"down,omitempty"`
	// Neighbour is the state of the kernel's entry of Via, as ip-neighbour(8) has it, or NoNeighbour; empty: the link
	// knows no neighbours.
	Neighbour string `json:"neighbour,omitempty"`
	// Silent: asked for by ARP or NDP just now, Via did not answer.
	Silent bool `json:"silent,omitempty"`
	// Fault says why there is no next hop; empty: there is one.
	Fault string `json:"fault,omitempty"`
}

// NoNeighbour says that the kernel has no entry of a neighbour.
const NoNeighbour = "NONE"

// GaveUp reports whether the kernel itself has no answer of the neighbour, and so drops or holds what is for it.
func (h Hop) GaveUp() bool { return h.Neighbour == "FAILED" || h.Neighbour == "INCOMPLETE" }

// OverlayOverhead returns the bytes that the overlay puts before a packet: Ethernet, IP, UDP and VXLAN header (RFC
// 7348, section 5), where nodes have underlay addresses of the family of underlay.
func OverlayOverhead(underlay netip.Addr) int {
	if underlay.Is6() {
		return 14 + 40 + 8 + 8
	}
	return 14 + 20 + 8 + 8
}

// MaxDiffers bounds Kernel.Differs.
const MaxDiffers = 10
