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
	IP  netip.Addr // the egress IP, of the family of Pod
	ID  ID         // of that egress IP
}

// Query returns the question as parameters of a request.
func (q KernelQuestion) Query() url.Values {
	v := url.Values{"ip": {q.IP.String()}, "id": {strconv.Itoa(int(q.ID))}}
	if q.Pod.IsValid() {
		v.Set("pod", q.Pod.String())
	}
	return v
}

// ParseKernelQuestion reads what Query wrote. Anybody may have written it.
func ParseKernelQuestion(v url.Values) (q KernelQuestion, err error) {
	var errs []error
	if q.IP, err = netip.ParseAddr(v.Get("ip")); err != nil || q.IP.Zone() != "" || q.IP.Is4In6() {
		errs = append(errs, fmt.Errorf("ip %.50q: want an egress IP", v.Get("ip")))
	}
	id, err := strconv.ParseUint(v.Get("id"), 10, 16)
	if q.ID = ID(id); err != nil || id == 0 {
		errs = append(errs, fmt.Errorf("id %.50q: want the id of an egress IP, 1 to %d", v.Get("id"), MaxID))
	}
	if pod := v.Get("pod"); pod != "" {
		if q.Pod, err = netip.ParseAddr(pod); err != nil || q.Pod.Zone() != "" || q.Pod.Is4In6() || q.Pod.Is4() != q.IP.Is4() {
			errs = append(errs, fmt.Errorf("pod %.50q: want an address of the family of the egress IP", pod))
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
	// First, Ports and PortsUsed are the block of ports that new connections get theirs of, and how many were in use
	// to one destination when that was last counted. Ports 0: there is no block.
	First     uint16 `json:"first_port,omitempty"`
	Ports     int    `json:"ports,omitempty"`
	PortsUsed int    `json:"ports_used,omitempty"`
	// Connections are those of the pod with the id that conntrack has.
	Connections int `json:"connections"`
	// Guarded is how long ago, in seconds, the guard dropped a packet of the id; negative: not within the last half
	// minute.
	Guarded float64 `json:"guarded_seconds"`
	// Dropped are the packets that all of the node's tables dropped, of any pod, by reason (nft.Counter).
	Dropped map[string]uint64 `json:"dropped_packets,omitempty"`
}

// MaxDiffers bounds Kernel.Differs.
const MaxDiffers = 10
