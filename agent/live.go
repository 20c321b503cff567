package agent

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// LivePage is where the agent is asked to follow packets of a pod through its kernel, with the parameters of
// egress.LiveQuestion. It answers with an egress.Live, and is for those who may ask at KernelPage.
const LivePage = "/live"

const (
	// liveTime is for how long packets are waited for. An answer has to begin within 10 s (monitor).
	liveTime = 8 * time.Second
	// liveRest is for how long the rest is waited for, of the first packet and its answer, once that came.
	liveRest = time.Second
)

// livePage is LivePage. One question at a time: it mostly waits, so it holds up no other kind of question.
func (a *answerer) livePage(w http.ResponseWriter, r *http.Request) {
	q, err := egress.ParseLiveQuestion(r.URL.Query())
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	case a.isOther(w, r):
		return
	case !a.following.TryLock():
		http.Error(w, nft.ErrTracing.Error()+": ask again", http.StatusServiceUnavailable)
		return
	}
	defer a.following.Unlock()
	answer, err := a.live(r.Context(), q)
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
	if d == nil {
		return egress.Live{}, errProgramming
	}
	sources, err := sourcesOf(*d, q.KernelQuestion)
	if err != nil {
		return egress.Live{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, liveTime)
	defer cancel()
	l := newFollower(q.To)
	flow := nft.Flow{Sources: sources, Destination: q.To, Protocol: q.Protocol, Port: q.Port}
	_, err = nft.Trace(ctx, flow, func(e nft.TraceEvent) bool {
		if l.add(e); len(l.list) == 1 {
			time.AfterFunc(liveRest, cancel)
		}
		return true
	})
	out := egress.Live{Node: a.Node, Packets: []egress.LivePacket{}}
	for _, p := range l.list {
		out.Packets = append(out.Packets, *p)
	}
	return out, err
}

// sourcesOf returns the sources that packets of a pod have on a node: the pod's, the egress IP, and the address in the overlay.
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

// follower puts steps of packets together, of each kind of packet the first.
type follower struct {
	packets map[uint32]*egress.LivePacket // by the kernel's number; nil: not the first of its kind
	latest  map[int]begun                 // by the index of the link that it came in by
	list    []*egress.LivePacket
	outside netip.Addr // whom the packets are to, or from
}

func newFollower(outside netip.Addr) *follower {
	return &follower{outside: outside, packets: map[uint32]*egress.LivePacket{}, latest: map[int]begun{}}
}

// begun is a packet that began.
type begun struct {
	packet   *egress.LivePacket // nil: not the first of its kind
	from, to netip.Addr
}

// add takes in a step.
func (l *follower) add(e nft.TraceEvent) {
	p, known := l.packets[e.Packet]
	switch last := l.latest[e.In]; {
	case e.Began != "": // also where the kernel uses a number again
		p = nil
		if !slices.ContainsFunc(l.list, func(p *egress.LivePacket) bool { return p.What == e.Began }) {
			p = &egress.LivePacket{What: e.Began, Steps: []egress.LiveStep{}}
			l.list = append(l.list, p)
		}
		l.packets[e.Packet], l.latest[e.In] = p, begun{p, e.From, e.To}
	case !known && e.From.IsValid() && (e.From == l.outside || e.To == l.outside || e.From == last.from && e.To == last.to):
		// The kernel numbers a packet anew when it has its route. Of its addresses the one outside stays, and the next number
		// is told before other packets come in, which are few.
		p = last.packet
		l.packets[e.Packet] = p
	}
	if p == nil || len(p.Steps) == egress.MaxLiveSteps {
		return // of another trace, too
	}
	if p.In == "" {
		p.In = linkName(e.In)
	}
	if out := linkName(e.Out); out != "" {
		p.Out = out
	}
	if e.Table != nft.TraceTable {
		p.Steps = append(p.Steps, egress.LiveStep{Table: e.Family + " " + e.Table, Chain: e.Chain, Rule: e.Rule, Verdict: e.Verdict})
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
