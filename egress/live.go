package egress

import (
	"errors"
	"fmt"
	"net/url"
	"strconv"
)

// LiveQuestion asks an agent to follow packets of a pod through its kernel: those of Protocol, which is one of
// Protocols, to Port; 0: any. To is set; Pod is not, where the node is asked as the gateway alone.
type LiveQuestion struct {
	KernelQuestion
	// Send: the agent sends one in the name of Pod. It takes a Port, but of ICMP.
	Send bool
}

// Query returns the question as parameters of a request.
func (q LiveQuestion) Query() url.Values {
	v := q.KernelQuestion.Query()
	v.Set("protocol", strconv.Itoa(int(q.Protocol)))
	v.Set("port", strconv.Itoa(int(q.Port)))
	if q.Send {
		v.Set("send", "true")
	}
	return v
}

// ParseLiveQuestion reads what Query wrote. Anybody may have written it.
func ParseLiveQuestion(v url.Values) (q LiveQuestion, err error) {
	var errs []error
	if q.KernelQuestion, err = ParseKernelQuestion(v); err != nil {
		errs = append(errs, err)
	} else if !q.IP.IsValid() || !q.To.IsValid() {
		errs = append(errs, errors.New("ip and to: want the egress IP, and the address that the packets are for"))
	}
	icmp, _ := Protocol("icmp", q.To) // of a name that there is
	if q.Protocol != 6 && q.Protocol != 17 && q.Protocol != icmp {
		errs = append(errs, fmt.Errorf("protocol %.50q: want the number of TCP, UDP, or the ICMP of the address", v.Get("protocol")))
	}
	if q.Port != 0 && q.Protocol == icmp {
		errs = append(errs, fmt.Errorf("port %.50q: want one of TCP or UDP, or 0", v.Get("port")))
	}
	switch send := v.Get("send"); {
	case send == "":
	case send != "true":
		errs = append(errs, fmt.Errorf("send %.50q: want true, or nothing", send))
	case !q.Pod.IsValid() || q.Port == 0 && q.Protocol != icmp:
		errs = append(errs, errors.New("send: want the pod in whose name it is, and the port of TCP or UDP that it is for"))
	default:
		q.Send = true
	}
	return q, errors.Join(errs...)
}

// Live is what a node saw of the packets that it followed, in the order in which they began: of each kind the last
// MaxLivePackets. The gateway's may be of other pods of the egress IP, too.
type Live struct {
	Node    string       `json:"node"`
	Packets []LivePacket `json:"packets"`
	// Lost: the kernel told more steps than the agent read.
	Lost bool `json:"lost,omitempty"`
	// Sent: the agent sent a packet in the pod's name. Unsent says why it could not. Neither: it was not asked to, or
	// is of a version that does not.
	Sent   bool   `json:"sent,omitempty"`
	Unsent string `json:"unsent,omitempty"`
}

// MaxLivePackets bounds how many packets of a kind Live has.
const MaxLivePackets = 32

// What a packet is.
const (
	LiveSent      = "sent"       // by the pod, or as it goes on from the overlay
	LiveBack      = "back"       // an answer
	LiveTunnelIn  = "tunnel_in"  // either, as it comes from another node
	LiveTunnelOut = "tunnel_out" // either, as it goes to another node
)

// LivePacket is a packet and the chains that it met, as the kernel's trace told.
type LivePacket struct {
	What string `json:"what"`
	// Port is that of the pod's end as the packet came, or the identifier of an ICMP echo; of one in the overlay the
	// port that VXLAN sends it from. 0: it has none. Translated is what Port becomes on the pod's node, of what the pod
	// sent; 0: the node has no such connection.
	Port       uint16 `json:"port,omitempty"`
	Translated uint16 `json:"translated_port,omitempty"`
	// In and Out are the links by which it came and would leave; Out is empty where it got no further than to its
	// route.
	In    string     `json:"in,omitempty"`
	Out   string     `json:"out,omitempty"`
	Steps []LiveStep `json:"steps"` // at most MaxLiveSteps
}

// MaxLiveSteps bounds LivePacket.Steps.
const MaxLiveSteps = 200

// LiveStep is a rule that a packet matched, or the policy of a chain that it came to the end of.
type LiveStep struct {
	Table   string `json:"table"` // with its family, as "ip filter"
	Chain   string `json:"chain"`
	Rule    uint64 `json:"rule,omitempty"` // its handle (nft -a); 0: the policy
	Verdict string `json:"verdict"`
}

// Packet returns what was seen of one kind of packet: of those that may be it one that was dropped, else one that had a
// route, else the first.
func (l Live) Packet(what string, may func(LivePacket) bool) (best LivePacket, ok bool) {
	worth := func(p LivePacket) int {
		if _, dropped := p.Dropped(); dropped {
			return 2
		} else if p.Out != "" {
			return 1
		}
		return 0
	}
	for _, p := range l.Packets {
		if p.What == what && may(p) && (!ok || worth(p) > worth(best)) {
			best, ok = p, true
		}
	}
	return best, ok
}

// Dropped returns the step at which the packet was dropped; false: no chain dropped it.
func (p LivePacket) Dropped() (LiveStep, bool) {
	if n := len(p.Steps); n > 0 && p.Steps[n-1].Verdict == "drop" {
		return p.Steps[n-1], true
	}
	return LiveStep{}, false
}
