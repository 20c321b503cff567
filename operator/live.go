package operator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// headStart is how much earlier the gateway is asked to follow a packet than the pod's node.
	headStart = 500 * time.Millisecond
	// livePatience is for how long nodes are asked that follow other packets, or rest after that.
	livePatience = 12 * time.Second
)

// Live says which packets of a pod are followed.
type Live struct {
	Protocol byte   // see egress.Protocol
	Port     uint16 // of the destination; 0: any
	Page     string // where agents are asked for it
}

// Sends reports whether the pod's node sends a packet in the pod's name: where it is said which one. Else one that the
// pod sends is waited for.
func (l Live) Sends() bool { return l.Port != 0 || l.Protocol != 6 && l.Protocol != 17 }

// followed are what the nodes on a pod's way saw of a packet.
type followed struct {
	home, gateway string
	pod, what     string // for texts: the pod, and the packet
	answers       bool   // an answer is to be expected
	seen          map[string]egress.Live
}

// follow has the nodes on the way of a pod's packet follow one, all at once, and returns the steps that they tell.
func follow(ctx context.Context, w store.Whole, q Question, ask Ask) (steps []Step) {
	step := addTo(&steps)
	for _, p := range find(w, q.Pod) {
		if !p.selected() || p.ip.Is4() != q.To.Is4() {
			continue
		}
		for _, a := range w.Egresses[p.egress].Addresses {
			owner, held := w.Owners[a.IP]
			if a.IP.Is4() != p.ip.Is4() || !held {
				continue
			}
			f := followed{home: p.node, gateway: owner.Node, pod: q.Pod, what: fmt.Sprintf("a packet of %s to %s", q.Pod, q.To), answers: q.Live.Protocol != 17}
			kq := egress.KernelQuestion{Pod: p.ip, IP: a.IP, ID: a.ID, To: q.To, Protocol: q.Live.Protocol, Port: q.Live.Port}
			if owner.Node != p.node {
				kq.Peer = w.Nodes[owner.Node].Index
			}
			if f.ask(ctx, w, egress.LiveQuestion{KernelQuestion: kq, Send: q.Live.Sends() && excepted(&w.Snapshot, q.To) == ""}, q.Live.Page, ask, step) {
				f.tell(step)
			}
			return steps
		}
	}
	step("live", "", "nothing is followed: no node holds an egress IP of the pod, of the family of %s", q.To)
	return steps
}

// ask asks the nodes, again while one of them is busy, and reports whether all of them told what they saw.
func (f *followed) ask(ctx context.Context, w store.Whole, q egress.LiveQuestion, page string, ask Ask, step adds) bool {
	nodes := []string{f.home, f.gateway}
	if f.home == f.gateway {
		nodes = nodes[:1]
	}
	patient, cancel := context.WithTimeout(ctx, livePatience)
	defer cancel()
	var node string
	err := whileBusy(patient, func() (err error) { node, err = f.askOnce(ctx, w, nodes, q, page, ask); return err })
	switch {
	case errors.Is(err, ErrNoWay):
		step("live", doubts, "%s follows no packet: %v: --agents-port asks those of other nodes", node, err)
	case err != nil:
		step("live", doubts, "%s follows no packet: %v", node, err)
	}
	return err == nil
}

// askOnce asks the nodes, all at once. Where one fails the others are not waited for, and it returns which one.
func (f *followed) askOnce(ctx context.Context, w store.Whole, nodes []string, q egress.LiveQuestion, page string, ask Ask) (failed string, err error) {
	f.seen = map[string]egress.Live{}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var mu sync.Mutex // guards f.seen, failed and err
	for _, node := range nodes {
		q := q
		if node != f.home {
			q.Pod, q.Peer, q.Send = netip.Addr{}, w.Nodes[f.home].Index, false
		}
		wg.Go(func() {
			if node == f.home && f.home != f.gateway {
				select { // so that the gateway misses no packet that this node sees
				case <-time.After(headStart):
				case <-ctx.Done():
					return
				}
			}
			var l egress.Live
			askErr := ask(ctx, node, w.Nodes[node].Addresses, page, q.Query(), &l)
			mu.Lock()
			defer mu.Unlock()
			if f.seen[node] = l; askErr != nil && err == nil { // the others' come from cancel
				failed, err = node, askErr
				cancel()
			}
		})
	}
	wg.Wait()
	if err == nil && ctx.Err() != nil {
		return f.home, ctx.Err()
	}
	return failed, err
}

// tell adds what was seen, and what it means, in the order of the way. That a packet stops is said where a rule was
// seen to drop it: what was not seen may have been lost of the trace, or was more than a node follows.
func (f *followed) tell(step adds) {
	for _, node := range []string{f.home, f.gateway} {
		if f.seen[node].Lost {
			step("live", "", "%s: its kernel told more steps than its agent read: some are lost", node)
		}
		if f.home == f.gateway {
			break
		}
	}
	sent, ok := f.packet(f.home, egress.LiveSent, "from the pod", anyOf, step)
	switch {
	case !ok && f.seen[f.home].Sent:
		step("live", doubts, "%s, which %s sent in its name, was not seen there: a program of tc or XDP at the pod's link took it, or steps of the trace are lost",
			f.what, f.home)
		return
	case !ok && f.seen[f.home].Unsent != "":
		step("live", doubts, "%s sends nothing in the name of %s: %s. Have the pod send one itself, and ask again meanwhile", f.home, f.pod, f.seen[f.home].Unsent)
		return
	case !ok:
		step("live", doubts, "%s did not come to %s while it was waited for: have the pod send one meanwhile (of TCP, open a connection)", f.what, f.home)
		return
	case dropped(sent):
		return
	case sent.Out == "":
		step("live", doubts, "%s was not seen on %s after it came by link %s: %s", f.what, f.home, sent.In, unrouted)
		return
	}
	ports := map[uint16]bool{} // of the pod, outside
	for _, p := range f.seen[f.home].Packets {
		if p.What == egress.LiveSent && p.Translated != 0 {
			ports[p.Translated] = true
		}
	}
	if len(ports) == 0 {
		step("live", doubts, "%s has no connection of it, so it cannot be told from packets of other pods from there on", f.home)
		return
	}
	pods := func(p egress.LivePacket) bool { return ports[p.Port] }
	if f.home == f.gateway {
		back, came := f.packet(f.home, egress.LiveBack, "the answer", pods, step)
		f.leaves(sent, came, step)
		f.returns(back, came, step)
		return
	}
	out, left := f.packet(f.home, egress.LiveTunnelOut, "into the overlay", anyOf, step)
	in, came := f.packet(f.gateway, egress.LiveTunnelIn, "from the overlay", anyOf, step)
	there, on := f.packet(f.gateway, egress.LiveSent, "out of the overlay", pods, step)
	answer, answered := f.packet(f.gateway, egress.LiveBack, "the answer", pods, step)
	backOut, _ := f.packet(f.gateway, egress.LiveTunnelOut, "an answer, into the overlay", anyOf, step)
	backIn, _ := f.packet(f.home, egress.LiveTunnelIn, "an answer, from the overlay", anyOf, step)
	back, returned := f.packet(f.home, egress.LiveBack, "the answer, out of the overlay", pods, step)
	switch {
	case slices.ContainsFunc([]egress.LivePacket{out, in, there, answer, backOut, backIn, back}, dropped):
		return
	case returned: // so it left, however little the gateway saw
	case !on && !left:
		step("live", doubts, "%s was not seen to go from %s into the overlay", f.what, f.home)
		return
	case !on && !came:
		step("live", doubts, "%s leaves %s for %s, and was not seen to come there", f.what, f.home, f.gateway)
		return
	case !on:
		step("live", doubts, "%s was not seen to come out of the overlay on %s, to which others of the egress IP came", f.what, f.gateway)
		return
	case there.Out == "":
		step("live", doubts, "%s was not seen on %s after it came out of the overlay: %s", f.what, f.gateway, unrouted)
		return
	}
	if on {
		f.leaves(there, answered || returned, step)
	}
	if answered && !returned {
		step("live", doubts, "the answer came to %s, and was not seen out of the overlay on %s", f.gateway, f.home)
	}
	f.returns(back, returned, step)
}

// unrouted says what may be of a packet that was not seen to have a route.
const unrouted = "it has no route, rp_filter of the link refuses its source, a program took it, or steps of the trace are lost"

// leaves says that a packet left by the gateway, and whether an answer came.
func (f *followed) leaves(p egress.LivePacket, answered bool, step adds) {
	step("live", "", "%s left %s by link %s", f.what, f.gateway, p.Out)
	if !answered && f.answers {
		step("live", doubts, "%s left %s, and no answer was seen there", f.what, f.gateway)
	}
}

// returns says whether the answer that came to the pod's node went on to the pod.
func (f *followed) returns(p egress.LivePacket, came bool, step adds) {
	switch {
	case !came || dropped(p):
	case p.Out == "":
		step("live", doubts, "the answer came to %s, and was not seen to go on to the pod", f.home)
	default:
		step("live", "", "an answer, or a refusal, came to the pod by link %s of %s", p.Out, f.home)
	}
}

func anyOf(egress.LivePacket) bool { return true }

// packet adds a step with the chains that a packet of those that may be it met on a node, and the fault where one of
// them dropped it; and one where a packet was dropped that may be another pod's.
func (f *followed) packet(node, what, words string, may func(egress.LivePacket) bool, step adds) (egress.LivePacket, bool) {
	p, ok := f.seen[node].Packet(what, may)
	if ok {
		links := ""
		if p.In != "" {
			links += ", in by " + p.In
		}
		if p.Out != "" {
			links += ", out by " + p.Out
		}
		step("live", "", "%s, %s%s: %s", node, words, links, chains(p.Steps))
	}
	if at, yes := p.Dropped(); yes {
		step("live", stops, "%s drops it, %s: %s", node, words, ruleAt(at))
		return p, ok
	}
	other, _ := f.seen[node].Packet(what, func(p egress.LivePacket) bool { return !may(p) })
	if at, yes := other.Dropped(); yes {
		step("live", doubts, "%s drops one that may be of another pod, %s: %s", node, words, ruleAt(at))
	}
	return p, ok
}

// ruleAt says where a packet was dropped.
func ruleAt(at egress.LiveStep) string {
	by := "the policy"
	if at.Rule != 0 {
		by = fmt.Sprintf("rule %d (nft -a list chain %s %s)", at.Rule, at.Table, at.Chain)
	}
	return fmt.Sprintf("%s of chain %s of table %s", by, at.Chain, at.Table)
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
