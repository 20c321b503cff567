package agent

import (
	"hash/maphash"
	"net/netip"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/natlog"
)

// flow is what is remembered of a connection that was logged.
type flow struct {
	names   *named         // nil: it is none that is logged
	is      conntrack.Flow // without what was counted
	since   time.Time      // when the agent heard of it
	quiet   bool           // the kernel may not tell of its end
	missing bool           // the last listing did not have it
	known   bool           // it was there before: when it began is not known
}

type flowKey struct {
	id          uint32
	protocol    uint8
	source, to  uint16
	from, where netip.Addr
}

// key tells a connection from others: by the kernel's number of it, and its ends.
func (n *natLogger) key(c *conntrack.Flow) uint64 {
	return maphash.Comparable(n.seed, flowKey{c.ID, c.Protocol, c.SourcePort, c.DestinationPort, c.Source, c.Destination})
}

// merge takes in a listing: what nobody has told of is logged as known, and what is gone for the second time as ended.
func (n *natLogger) merge(l listed, now time.Time) {
	first := n.listed.IsZero()
	n.listing, n.listed, n.rest = nil, now, max(listShare*now.Sub(l.began), min(n.every, time.Second))
	ended := n.ended
	n.ended = nil
	if l.err != nil {
		n.log.Warn("connections were not listed for the log of them, will retry", "err", l.err)
		n.lost = true
		return
	}
	n.names.follow(n.snapshot(), now)
	there := make(map[uint64]bool, len(l.flows))
	for i := range l.flows {
		k := n.key(&l.flows[i])
		there[k] = true
		if f := n.flows[k]; f != nil {
			f.missing = false
		} else if !ended[k] && (first || len(n.flows) < n.most) { // else it is told again with each listing
			n.begin(k, &l.flows[i], natlog.Known, now)
		}
	}
	for k, f := range n.flows {
		switch {
		case there[k] || !f.since.Before(l.began):
		case f.missing:
			n.end(k, f, nil, now)
		default:
			f.missing = true
			n.lost = n.lost || !f.quiet // it is looked at again soon: its end may be lost, or be in the queue
		}
	}
}

func (n *natLogger) sample() int {
	if n.cfg.Sample > 1 {
		return n.cfg.Sample
	}
	return 0
}

// sampled reports whether a connection is one of those that are logged, always the same for all that is said of it, by
// whatever agent: by what is constant of it (FNV-1a, https://www.rfc-editor.org/rfc/rfc9923).
func (n *natLogger) sampled(c *conntrack.Flow) bool {
	if n.cfg.Sample <= 1 {
		return true
	}
	h := uint64(14695981039346656037)
	add := func(b byte) { h = (h ^ uint64(b)) * 1099511628211 }
	for _, ip := range []netip.Addr{c.Source, c.Destination} {
		for _, b := range ip.As16() {
			add(b)
		}
	}
	for _, v := range []uint32{c.ID, uint32(c.SourcePort)<<16 | uint32(c.DestinationPort), uint32(c.Protocol)} {
		add(byte(v >> 24))
		add(byte(v >> 16))
		add(byte(v >> 8))
		add(byte(v))
	}
	return (h>>32^h)%uint64(n.cfg.Sample) == 0
}
