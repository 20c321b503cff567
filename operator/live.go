package operator

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// headStart is how much earlier the gateway is asked to follow a packet than the pod's node.
const headStart = 500 * time.Millisecond

// Live says which packets of a pod are followed.
type Live struct {
	Protocol byte   // see egress.Protocol
	Port     uint16 // of the destination; 0: any
	Page     string // where agents are asked for it
}

// followed are what the nodes on a pod's way saw of a packet.
type followed struct {
	home, gateway string
	what          string // whose packet it is, for texts
	answers       bool   // an answer is to be expected
	seen          map[string]egress.Live
}

// follow has the nodes on the way of a pod's packet follow one, all at once, and returns the steps that they tell.
func follow(ctx context.Context, w store.Whole, q Question, ask Ask) (steps []Step) {
	step := addTo(&steps)
	node, _, of := find(w, q.Pod)
	for name, ips := range of {
		for _, pod := range ips {
			if pod.Is4() != q.To.Is4() {
				continue
			}
			for _, a := range w.Egresses[name].Addresses {
				owner, held := w.Owners[a.IP]
				if a.IP.Is4() != pod.Is4() || !held {
					continue
				}
				f := followed{home: node, gateway: owner.Node, what: fmt.Sprintf("a packet of %s to %s", q.Pod, q.To), answers: q.Live.Protocol != 17}
				kq := egress.KernelQuestion{Pod: pod, IP: a.IP, ID: a.ID, To: q.To}
				if f.ask(ctx, w, egress.LiveQuestion{KernelQuestion: kq, Protocol: q.Live.Protocol, Port: q.Live.Port}, q.Live.Page, ask, step) {
					f.tell(step)
				}
				return steps
			}
		}
	}
	step("live", "", "nothing is followed: no node holds an egress IP of the pod, of the family of %s", q.To)
	return steps
}

// ask asks the nodes, and reports whether all of them told what they saw.
func (f *followed) ask(ctx context.Context, w store.Whole, q egress.LiveQuestion, page string, ask Ask, step adds) bool {
	f.seen = map[string]egress.Live{}
	silent := map[string]error{}
	nodes := []string{f.home, f.gateway}
	if f.home == f.gateway {
		nodes = nodes[:1]
	}
	var wg sync.WaitGroup
	var mu sync.Mutex // guards seen and silent
	for _, node := range nodes {
		q := q
		if node != f.home {
			q.Pod, q.Peer = netip.Addr{}, w.Nodes[f.home].Index
		}
		wg.Go(func() {
			if node == f.home && f.home != f.gateway {
				select { // so that the gateway misses no packet that this node sees
				case <-time.After(headStart):
				case <-ctx.Done():
				}
			}
			var l egress.Live
			err := ask(ctx, node, w.Nodes[node].Addresses, page, q.Query(), &l)
			mu.Lock()
			defer mu.Unlock()
			if f.seen[node] = l; err != nil {
				silent[node] = err
			}
		})
	}
	wg.Wait()
	for _, node := range nodes {
		if err := silent[node]; err != nil {
			step("live", doubts, "%s follows no packet: %v", node, err)
		}
	}
	return len(silent) == 0
}

// tell adds what was seen, and what it means, in the order of the way.
func (f *followed) tell(step adds) {
	remote := f.home != f.gateway
	sent, ok := f.packet(f.home, egress.LiveSent, "from the pod", step)
	switch {
	case !ok:
		step("live", doubts, "%s did not come to %s while it was waited for: have the pod send one meanwhile", f.what, f.home)
		return
	case dropped(sent):
		return
	case sent.Out == "":
		step("live", stops, "%s ends on %s before it is routed: it has no route, or rp_filter of link %s refuses its source", f.what, f.home, sent.In)
		return
	}
	if remote && !f.tunnel(f.home, f.gateway, step) {
		return
	}
	if remote {
		if sent, ok = f.packet(f.gateway, egress.LiveSent, "out of the overlay", step); !ok {
			step("live", stops, "%s comes to %s, and not out of the overlay there", f.what, f.gateway)
			return
		}
		if dropped(sent) {
			return
		}
		if sent.Out == "" {
			step("live", stops, "%s ends on %s before it is routed: it has no route, or rp_filter refuses its source", f.what, f.gateway)
			return
		}
	}
	step("live", "", "%s left %s by link %s", f.what, f.gateway, sent.Out)
	back, ok := f.packet(f.gateway, egress.LiveBack, "the answer", step)
	switch {
	case !ok && f.answers:
		step("live", doubts, "%s left %s, and no answer came there within a second", f.what, f.gateway)
		return
	case !ok || dropped(back):
		return
	}
	if remote && f.tunnel(f.gateway, f.home, step) {
		if back, ok := f.packet(f.home, egress.LiveBack, "the answer, out of the overlay", step); !ok || back.Out == "" && !dropped(back) {
			step("live", stops, "the answer comes to %s, and goes no further there", f.home)
		}
	}
}

// tunnel adds what was seen of a packet in the overlay, and reports whether it came to the other end.
func (f *followed) tunnel(from, to string, step adds) bool {
	out, left := f.packet(from, egress.LiveTunnelOut, "into the overlay", step)
	if dropped(out) {
		return false
	}
	in, came := f.packet(to, egress.LiveTunnelIn, "from the overlay", step)
	switch {
	case !left && !came:
		step("live", stops, "it does not get from %s into the overlay", from)
	case !came:
		step("live", stops, "it leaves %s for %s by link %s, and does not come to %s", from, to, out.Out, to)
	}
	return came && !dropped(in)
}

// packet adds a step with the chains that a packet met on a node, and the fault where one of them dropped it.
func (f *followed) packet(node, what, words string, step adds) (egress.LivePacket, bool) {
	p, ok := f.seen[node].Packet(what)
	if !ok {
		return p, false
	}
	links := ""
	if p.In != "" {
		links += ", in by " + p.In
	}
	if p.Out != "" {
		links += ", out by " + p.Out
	}
	step("live", "", "%s, %s%s: %s", node, words, links, chains(p.Steps))
	if at, yes := p.Dropped(); yes {
		by := "the policy"
		if at.Rule != 0 {
			by = fmt.Sprintf("rule %d (nft -a list chain %s %s)", at.Rule, at.Table, at.Chain)
		}
		step("live", stops, "%s drops it, %s: %s of chain %s of table %s", node, words, by, at.Chain, at.Table)
	}
	return p, true
}

func dropped(p egress.LivePacket) bool { _, yes := p.Dropped(); return yes }

// chains says which chains a packet met, and which rules of them.
func chains(steps []egress.LiveStep) string {
	if len(steps) == 0 {
		return "no chain"
	}
	var b strings.Builder
	last := ""
	for _, s := range steps {
		if at := s.Table + " " + s.Chain; at != last {
			if last != "" {
				b.WriteString("; ")
			}
			b.WriteString(at + ":")
			last = at
		}
		if s.Rule == 0 {
			b.WriteString(" policy")
		} else {
			fmt.Fprintf(&b, " %d", s.Rule)
		}
		if s.Verdict != "continue" {
			b.WriteString(" " + s.Verdict)
		}
	}
	return b.String()
}
