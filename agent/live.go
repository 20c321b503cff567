package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/inject"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// LivePage is where the agent is asked to follow packets of a pod through its kernel, with the parameters of
// egress.LiveQuestion. It answers with an egress.Live, and is for those who may ask at ConnectionsPage.
const LivePage = "/live"

const (
	// liveTime is for how long a gateway waits for packets. An answer has to be sent within 10 s (monitor), with what
	// it takes to begin and to end.
	liveTime = 6500 * time.Millisecond
	// podTime is for how long the pod's node does, which is asked a little later (operator): whatever it sees the
	// gateway has another second for.
	podTime = 4500 * time.Millisecond
	// liveRest is for how long the pod's node waits for the rest, of the first packet and its answer, once that came.
	liveRest = time.Second
	// livePause is the least time from the end of one trace to the next: each is two changes of the ruleset, which
	// packets of all of the node wait for.
	livePause = 3 * time.Second
)

// livePage is LivePage. One question at a time: it mostly waits, so it holds up no other kind of question.
func (a *answerer) livePage(w http.ResponseWriter, r *http.Request) {
	q, err := egress.ParseLiveQuestion(r.URL.Query())
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case isOther(a.node, w, r):
		return
	case !a.following.TryLock():
		http.Error(w, nft.ErrTracing.Error()+": ask again", http.StatusServiceUnavailable)
		return
	}
	defer a.following.Unlock()
	if left := time.Until(a.followed.Add(livePause)); left > 0 {
		http.Error(w, "the agent rests after a trace: ask again in "+left.Round(time.Second).String(), http.StatusServiceUnavailable)
		return
	}
	answer, err := a.live(r.Context(), q)
	a.followed = time.Now() // also after an error, or where nobody waits for the answer any more
	switch {
	case errors.Is(err, errNotHere):
		http.Error(w, err.Error(), http.StatusConflict)
	case errors.Is(err, nft.ErrTracing) || errors.Is(err, errProgramming):
		http.Error(w, err.Error()+": ask again", http.StatusServiceUnavailable)
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	default:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer) // who asked has gone
	}
}

// errNotHere says that a node has nothing of what it is to follow.
var errNotHere = errors.New("the node does not have the pod, or the egress IP: it follows packets of its own pods, and of the egress IPs that leave by it")

// follow follows packets of a pod.
func (a *agent) follow(ctx context.Context, q egress.LiveQuestion) (egress.Live, error) {
	d := a.kernel.programmed.desired.Load()
	for end := time.Now().Add(lookTime); d == nil && ctx.Err() == nil && time.Now().Before(end); d = a.kernel.programmed.desired.Load() {
		time.Sleep(lookAgain)
	}
	if d == nil {
		return egress.Live{}, errProgramming
	}
	sources, err := sourcesOf(*d, q.KernelQuestion)
	if err != nil {
		return egress.Live{}, err
	}
	wait := liveTime
	if q.Pod.IsValid() {
		wait = podTime
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	l := &follower{pod: q.Pod, peer: d.NFT.Peers[q.Peer], sources: sources, packets: map[uint32]*packet{}}
	// What passes by the fast path no trace sees.
	resume, err := a.fast.Pause()
	if err != nil {
		return egress.Live{}, err
	}
	defer func() {
		if err := resume(); err != nil {
			a.Log.Warn("fast path not used again after a trace", "err", err)
		}
	}()
	flow := nft.Flow{Sources: sources, Destination: q.To, Protocol: q.Protocol, Port: q.Port}
	out := egress.Live{Node: a.Node, Packets: []egress.LivePacket{}}
	send := func() {
		if !q.Send {
			return
		}
		if out.Unsent = notOutside(*d, q.To); out.Unsent != "" {
			return
		}
		p := inject.Packet{From: q.Pod, To: q.To, Protocol: q.Protocol, FromPort: ephemeral(), Port: q.Port}
		if err := inject.Send(ctx, p); err != nil {
			out.Unsent = err.Error()
			return
		}
		out.Sent = true
	}
	out.Lost, err = nft.Trace(ctx, flow, send, func(e nft.TraceEvent) bool {
		if l.add(e) { // a gateway cannot tell which packets are the pod's, and waits for its whole time
			time.AfterFunc(liveRest, cancel)
		}
		return true
	})
	if err != nil {
		return out, err
	}
	if q.Pod.IsValid() && len(l.list) > 0 {
		flows, err := conntrack.Flows(q.ID.ConnMark(), ^egress.Mark(0))
		if err != nil {
			return out, err
		}
		l.translate(flows)
	}
	for _, p := range l.list {
		out.Packets = append(out.Packets, p.LivePacket)
	}
	return out, nil
}

// notOutside says why nothing is sent to an address in a pod's name; "": nothing speaks against it. Who may ask would
// find out which pods, Services and nodes there are, and which of their ports are open.
func notOutside(d plan.Desired, to netip.Addr) string {
	if p := exception(d.NFT, to); p.IsValid() { // as the addresses of all nodes are
		return fmt.Sprintf("no egress applies to %s, which is in %s", to, p)
	}
	if slices.Contains(d.NFT.Sources, to) {
		return fmt.Sprintf("%s is an egress IP", to)
	}
	return ""
}

// ephemeral returns a port as a kernel chooses one for a connection.
func ephemeral() uint16 { return uint16(32768 + rand.N(28232)) }

// sourcesOf returns the sources that packets of a pod have on a node: the pod's, the egress IP, and the address in the
// overlay.
func sourcesOf(d plan.Desired, q egress.KernelQuestion) ([]netip.Addr, error) {
	sources := []netip.Addr{q.IP}
	switch hosted, hosts := d.NFT.Hosted[q.ID]; {
	case q.Pod.IsValid():
		if d.NFT.Pods[q.Pod] != q.ID {
			return nil, errNotHere
		}
		sources = append(sources, q.Pod)
		if own, ok := d.NFT.OverlaySources[q.ID]; ok {
			sources = append(sources, own)
		}
	case !hosts || hosted.IP != q.IP:
		return nil, errNotHere
	case q.Peer != 0:
		sources = append(sources, egress.OverlaySource(q.Peer, q.ID, q.IP))
	}
	return sources, nil
}

// follower puts steps of packets together.
type follower struct {
	pod     netip.Addr // whose packets are followed from here; the zero Addr: the node is asked as the gateway alone
	peer    netip.Addr // the node at the other end of the overlay; the zero Addr: it is not known
	sources []netip.Addr
	packets map[uint32]*packet // by the kernel's number; nil: one that is not followed
	list    []*packet          // in the order in which they began
}

// packet is one that is followed, with the ends and the link with which it began.
type packet struct {
	egress.LivePacket
	nft.Ends
	in     int
	inside uint16 // of an answer that was translated back: the pod's port
}

// add takes in a step, and reports whether it is the first of the first packet from the pod.
func (l *follower) add(e nft.TraceEvent) (first bool) {
	p, known := l.packets[e.Packet]
	if e.Began != "" || !known { // the kernel may use a number again
		switch {
		case e.Began == "":
			p = l.numberedAnew(e)
		case l.follows(e):
			p = l.begin(e)
			first = len(l.list) == 1 && l.pod.IsValid()
		default:
			p = nil
		}
		if p != nil || e.Began != "" {
			l.packets[e.Packet] = p
		}
	}
	if p == nil {
		return false // of another trace, too
	}
	if p.In == "" {
		p.In = linkName(e.In)
	}
	if out := linkName(e.Out); out != "" {
		p.Out = out
	}
	if e.To.IsValid() && e.To == l.pod {
		p.inside = e.ToPort
	}
	if e.Table == nft.TraceTable || e.Verdict == "" {
		return first
	}
	s := egress.LiveStep{Table: e.Family + " " + e.Table, Chain: e.Chain, Rule: e.Rule, Verdict: e.Verdict}
	switch n := len(p.Steps); {
	case n < egress.MaxLiveSteps:
		p.Steps = append(p.Steps, s)
	case s.Verdict == "drop": // which is the last one
		p.Steps[n-1] = s
	}
	return first
}

// follows reports whether a packet that begins may be the pod's, or an answer to it: on the pod's node nothing is
// before the pod sent something, and in the overlay it comes from the other node, or goes there.
func (l *follower) follows(e nft.TraceEvent) bool {
	switch {
	case l.pod.IsValid() && e.Began == egress.LiveSent:
		return e.From == l.pod
	case l.pod.IsValid() && len(l.list) == 0:
		return false
	case e.Began == egress.LiveTunnelIn:
		return !l.peer.IsValid() || e.From == l.peer
	case e.Began == egress.LiveTunnelOut:
		return !l.peer.IsValid() || e.To == l.peer
	}
	return true
}

// begin adds a packet, in place of the oldest one of its kind where there are too many.
func (l *follower) begin(e nft.TraceEvent) *packet {
	p := &packet{LivePacket: egress.LivePacket{What: e.Began, Port: e.FromPort, Steps: []egress.LiveStep{}}, Ends: e.Ends, in: e.In}
	if e.Began == egress.LiveBack {
		p.Port = e.ToPort
	}
	of := func(o *packet) bool { return o.What == e.Began }
	n := 0
	for _, o := range l.list {
		if of(o) {
			n++
		}
	}
	if n == egress.MaxLivePackets {
		i := slices.IndexFunc(l.list, of)
		l.list = slices.Delete(l.list, i, i+1)
	}
	l.list = append(l.list, p)
	return p
}

// numberedAnew returns the packet that a step is of whose number is not known: the kernel gives a packet another one
// when it has its route, and when it is translated. nil: it is of another trace.
func (l *follower) numberedAnew(e nft.TraceEvent) *packet {
	for _, p := range slices.Backward(l.list) {
		if e.From.IsValid() && e.In == p.in && l.same(p, e.Ends) {
			return p
		}
	}
	return nil
}

// same reports whether ends are those of a packet, or those with the pod's end translated.
func (l *follower) same(p *packet, e nft.Ends) bool {
	echo := isEcho(e.Protocol) // its identifier is translated
	switch {
	case e == p.Ends:
		return true
	case e.Protocol != p.Protocol:
		return false
	case p.What == egress.LiveSent:
		return e.To == p.To && (e.ToPort == p.ToPort || echo) && e.From != p.From && slices.Contains(l.sources, e.From)
	case p.What == egress.LiveBack:
		return e.From == p.From && (e.FromPort == p.FromPort || echo) && e.To != p.To && slices.Contains(l.sources, e.To)
	}
	return false
}

func isEcho(protocol byte) bool {
	return protocol == unix.IPPROTO_ICMP || protocol == unix.IPPROTO_ICMPV6
}

// translate notes by which ports the pod's packets go on: by conntrack's entries, and by answers that came, as the
// kernel removes the entry of a connection that is refused.
func (l *follower) translate(flows []conntrack.Flow) {
	for _, p := range l.list {
		if p.What != egress.LiveSent {
			continue
		}
		for _, back := range l.list {
			if back.What == egress.LiveBack && back.inside != 0 && back.inside == p.FromPort {
				p.Translated = back.Port
			}
		}
		for _, c := range flows {
			if c.Source == p.From && c.Destination == p.To && c.Protocol == p.Protocol && c.SourcePort == p.FromPort &&
				(c.DestinationPort == p.ToPort || isEcho(c.Protocol)) {
				p.Translated = c.Port
			}
		}
	}
}

// linkName returns the name of a link by its index; "": there is none.
func linkName(index int) string {
	if index == 0 {
		return ""
	}
	link, err := net.InterfaceByIndex(index)
	if err != nil {
		return "" // it has gone
	}
	return link.Name
}
