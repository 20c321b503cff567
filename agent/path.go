package agent

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
)

// Addresses that stand for anywhere outside: of documentation, which no route but a default one leads to (RFC 5737, RFC
// 3849).
var anywhere4, anywhere6 = netip.MustParseAddr("203.0.113.1"), netip.MustParseAddr("2001:db8::1")

// pathOf returns the way of packets on from this node, and asks those on it whether they answer: as the kernel asks for
// the neighbour of a packet, by which no host learns or loses anything.
func (k *kernel) pathOf(ctx context.Context, d plan.Desired, q egress.KernelQuestion) (p egress.Path, err error) {
	var errs []error
	var hops []*routing.Hop
	look := func(to netip.Addr, mark egress.Mark) *egress.Hop {
		h, err := k.router.NextHop(to, mark)
		if err != nil {
			errs = append(errs, err)
			return nil
		}
		hops = append(hops, &h)
		return &h.Hop
	}
	if p.OverlayMTU, err = k.router.LinkMTU(egress.OverlayLink); err != nil {
		errs = append(errs, err)
	}
	if q.Pod.IsValid() {
		if h, err := k.router.NextHop(q.Pod, 0); err == nil && h.Fault == "" { // a pod that has gone has none
			p.PodMTU = h.MTU
		}
	}
	if peer, known := d.NFT.Peers[q.Peer]; known {
		p.Overlay = look(peer, 0)
	} else if q.Peer != 0 {
		p.Overlay = &egress.Hop{Fault: "the node is not known here"}
	}
	mark, leaves := exitMark(d, q.ID)
	to, want := exitOf(d, q, mark)
	switch {
	case leaves:
		if p.Exit = look(to, mark); p.Exit == nil {
			break
		}
		if p.Exit.Fault != "" && want == "" && !q.To.IsValid() {
			p.Exit = nil // what there is of destinations has routes of its own
		} else if want != "" {
			p.Diverted = diverted(*p.Exit, want)
		}
	case mark == egress.ToGatewayMark && q.Pod.IsValid():
		if h, err := k.router.NextHop(to, mark); err != nil {
			errs = append(errs, err)
		} else {
			p.Diverted = diverted(h.Hop, egress.OverlayLink)
		}
	}
	routers := map[netip.Addr]bool{}
	for _, s := range d.Routing.Subnets {
		routers[s.Gateway] = true
	}
	return p, errors.Join(append(errs, askHops(ctx, hops, routers))...)
}

// diverted says where packets go that are to leave by a link; empty: they do.
func diverted(h egress.Hop, link string) string {
	switch {
	case h.Link == link:
		return ""
	case h.Fault != "":
		return "nowhere (" + h.Fault + ") in place of link " + link
	}
	return "out by link " + h.Link + " in place of " + link
}

// exitMark returns the mark that packets of an egress IP leave this node with; false: they go to another one.
func exitMark(d plan.Desired, id egress.ID) (egress.Mark, bool) {
	if h, ok := d.NFT.Hosted[id]; ok {
		return h.Mark, true
	}
	mark, ok := d.NFT.NextHops[id]
	return mark, ok && mark != egress.ToGatewayMark
}

// exitOf returns the address whose route packets with a mark take, and the link that they have to leave by; "":
// whichever the main table says. The address is the one that was asked for, else the gateway of the subnet that the
// mark stands for, else anywhere.
func exitOf(d plan.Desired, q egress.KernelQuestion, mark egress.Mark) (to netip.Addr, link string) {
	to = anywhere6
	if q.IP.Is4() {
		to = anywhere4
	}
	for _, s := range d.Routing.Subnets {
		if s.Mark == mark && s.Gateway.Is4() == q.IP.Is4() {
			to, link = s.Gateway, s.Link
		}
	}
	if q.To.IsValid() {
		to = q.To
	}
	return to, link
}

// askHops asks the neighbours among the hops, all at once, and notes those that are silent. By ARP
// on the link of a VLAN only routers are asked.
func askHops(ctx context.Context, hops []*routing.Hop, routers map[netip.Addr]bool) error {
	var list []announce.Neighbour
	asked := hops[:0]
	for _, h := range hops {
		if h.Fault != "" || h.Down != "" || h.Neighbour == "" || h.Neighbour == "PERMANENT" {
			continue
		}
		n := announce.Neighbour{IP: h.Via, Link: h.Link}
		if !strings.HasPrefix(h.Link, egress.VLANLinkPrefix) { // the addresses there are egress IPs
			n.Sender = h.Source
		} else if h.Via.Is4() && h.Via == h.To && !routers[h.Via] {
			continue // to a host that looks for conflicts a request in nobody's name is one (RFC 5227, section 2.1.1)
		}
		asked, list = append(asked, h), append(list, n)
	}
	if len(list) == 0 {
		return nil
	}
	answered, err := announce.Answers(ctx, list)
	for _, h := range slices.DeleteFunc(asked, func(h *routing.Hop) bool { return err != nil }) {
		h.Silent = !answered[announce.Place{IP: h.Via, Link: h.Link}]
	}
	return err
}
