package agent

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
)

const (
	// portsEvery is how often it is looked how many connections were opened: a block has to be larger before it is
	// full. A look reads one number for each egress IP in use.
	portsEvery = time.Second
	// portsShare bounds the time that listings take: one that took d is followed by the next one after portsShare times
	// d at the earliest.
	portsShare = 20
	// drainEvery is how often it is looked whether retired blocks are empty; connections take minutes to days to end.
	drainEvery = 10 * time.Second
	// lowFor is for how long a node has to use little of a block before it asks for a smaller one, and lowEvery how
	// often that is looked at.
	lowFor, lowEvery = 10 * time.Minute, 2 * time.Minute
	// reportEvery is how often the record of the agent may change for its ports.
	reportEvery = 3 * time.Second
)

// ports finds out how many of its ports the node uses, which it asks for more or fewer by, and which retired blocks are
// empty.
//
// Ports bound the connections to one destination, so what counts is how many there are to the busiest. No table of
// connections is read for that as long as it cannot be many: at most as many as there were at the last listing, and
// those that were opened since.
type ports struct {
	log    *slog.Logger
	opened func() (map[egress.ID]uint64, error)
	list   func(m, mask egress.Mark) ([]conntrack.Flow, error)
	wake   func()
	// reuses: the kernel takes the ports of connections that have ended when it needs some, so they are not in use.
	reuses bool

	// What follows belongs to run.
	known      map[egress.ID]*portUse
	reportedAt time.Time // when reported changed last
	listAfter  time.Time // until when nothing is listed

	mu       sync.Mutex // guards what follows
	blocks   map[egress.ID][]egress.Block
	reported map[netip.Addr]egress.PortUse
	last     map[netip.Addr]portCount
}

// portCount is how many ports of a block were in use, to the busiest destination, when that was last counted.
type portCount struct {
	block egress.Block
	most  int
}

// portUse is what is known of the ports of one egress IP.
type portUse struct {
	block   egress.Block         // the one that new connections get ports of
	blocks  []egress.Block       // all that there are of the IP
	retired map[uint16]time.Time // since when a block is known to be retired, by its first port
	drained map[uint16]bool      // those of them that are empty
	listed  time.Time            // when the connections were listed; zero: never
	counted uint64               // how many had been opened by then
	most    int                  // how many ports of the block were in use then, for the busiest destination
	all     int                  // the same, of all ports
	low     time.Time            // since when few are; zero: they are not
	want    int                  // the size that it asks for; 0: what it has is enough
}

func newPorts(p *ports) *ports {
	p.known = map[egress.ID]*portUse{}
	return p
}

// follow takes over which blocks the node has, once the kernel has them, too.
func (p *ports) follow(blocks map[egress.ID][]egress.Block) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blocks = blocks
}

// use returns what the record of the agent says of its ports.
func (p *ports) use() map[netip.Addr]egress.PortUse {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.reported
}

// counts returns how many ports of each egress IP are in use.
func (p *ports) counts() map[netip.Addr]portCount {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}

// run looks again and again, until ctx ends.
func (p *ports) run(ctx context.Context) error {
	fault := ""
	for sleep(ctx, portsEvery) {
		changed, err := p.look(time.Now())
		if changed {
			p.wake()
		}
		if err == nil {
			fault = ""
		} else if err.Error() != fault {
			fault = err.Error()
			p.log.Warn("ports in use not counted, will retry", "err", err)
		}
	}
	return nil
}

// look finds out what there is to report, and reports whether that has changed.
func (p *ports) look(now time.Time) (changed bool, err error) {
	p.mu.Lock()
	blocks := p.blocks
	p.mu.Unlock()
	maps.DeleteFunc(p.known, func(id egress.ID, _ *portUse) bool { return len(blocks[id]) == 0 })
	if len(blocks) > 0 {
		opened, err := p.opened()
		if err != nil {
			return false, err
		}
		due := p.due(blocks, opened, now)
		if len(due) > 0 && !now.Before(p.listAfter) {
			if err := p.count(due, opened, now); err != nil {
				return false, err
			}
		}
	}
	return p.report(now), nil
}

// due takes over which blocks there are, and returns the ids whose connections have to be listed.
func (p *ports) due(blocks map[egress.ID][]egress.Block, opened map[egress.ID]uint64, now time.Time) (due []egress.ID) {
	for _, id := range slices.Sorted(maps.Keys(blocks)) {
		u := p.known[id]
		if u == nil {
			u = &portUse{}
			p.known[id] = u
		}
		u.follow(blocks[id], now)
		if n, ok := opened[id]; ok && n < u.counted {
			u.listed, u.counted = time.Time{}, 0 // counted anew
		}
		if u.due(opened[id], now) {
			due = append(due, id)
		}
	}
	return due
}

// count lists the connections of ids, and takes over what is in use. Each listing is a look at the whole table, so all
// ids share one.
func (p *ports) count(ids []egress.ID, opened map[egress.ID]uint64, now time.Time) error {
	m, mask := ids[0].ConnMark(), ^egress.Mark(0)
	if len(ids) > 1 {
		m, mask = egress.ConnTag, egress.ConnTagMask
	}
	began := time.Now()
	list, err := p.list(m, mask)
	p.listAfter = now.Add(portsShare * time.Since(began))
	if err != nil {
		return err
	}
	byID := map[egress.Mark][]conntrack.Connection{}
	for _, f := range list {
		byID[f.Mark] = append(byID[f.Mark], f.Connection)
	}
	for _, id := range ids {
		u := p.known[id]
		u.listed, u.counted = now, opened[id]
		u.count(byID[id.ConnMark()], p.reuses)
		u.judge()
	}
	return nil
}

// follow takes over which blocks of the IP there are.
func (u *portUse) follow(blocks []egress.Block, now time.Time) {
	current, _ := egress.Current(blocks, blocks[0].IP)
	retired := map[uint16]time.Time{}
	for _, b := range blocks {
		if b.Retired {
			if retired[b.First] = u.retired[b.First]; retired[b.First].IsZero() {
				retired[b.First] = now
			}
		}
	}
	u.retired = retired
	maps.DeleteFunc(u.drained, func(first uint16, _ bool) bool { _, ok := retired[first]; return !ok })
	if current.First != u.block.First || current.Size != u.block.Size || current.IP != u.block.IP {
		u.want, u.low, u.listed = 0, time.Time{}, time.Time{}
	}
	u.block, u.blocks = current, blocks
}

// bound is how many ports the busiest destination has at most, when so many connections were opened.
func (u *portUse) bound(opened uint64) int {
	if opened <= u.counted {
		return u.most
	}
	return u.most + int(min(opened-u.counted, uint64(egress.MaxBlock)))
}

// due reports whether the connections have to be listed.
func (u *portUse) due(opened uint64, now time.Time) bool {
	since := now.Sub(u.listed)
	for first, retired := range u.retired {
		if !u.drained[first] && since >= drainEvery && now.Sub(retired) >= drainEvery {
			return true
		}
	}
	if u.block.Size == 0 {
		return false
	}
	return u.listed.IsZero() || tooMany(u.bound(opened), u.block.Size) || u.want > u.block.Size && since >= drainEvery ||
		u.block.Size > egress.MinBlock && since >= lowEvery
}

// tooMany reports whether so many ports are more than three quarters of a block. The kernel looks at 240 ports of a
// large one before it drops the first packet of a connection, so that it begins to find none when some 19 of 20 are in
// use.
func tooMany(used, size int) bool { return 4*used > 3*size }

// tooFew reports whether they are at most an eighth: of the block that is asked for then they are a half.
func tooFew(used, size int) bool { return 8*used <= size }

// count takes over what is in use.
func (u *portUse) count(list []conntrack.Connection, reuses bool) {
	type destination struct {
		ip       netip.Addr
		port     uint16
		protocol uint8
	}
	current, all := map[destination]int{}, map[destination]int{}
	inUse := map[uint16]bool{} // the first ports of blocks
	u.most, u.all = 0, 0
	for _, c := range list {
		n := slices.IndexFunc(u.blocks, func(b egress.Block) bool { return b.Has(c.Translated, c.Port) })
		if n < 0 {
			continue
		}
		inUse[u.blocks[n].First] = true
		if c.Ended && reuses {
			continue
		}
		to := destination{c.Destination, c.DestinationPort, c.Protocol}
		all[to]++
		u.all = max(u.all, all[to])
		if u.blocks[n].First == u.block.First {
			current[to]++
			u.most = max(u.most, current[to])
		}
	}
	if u.drained == nil {
		u.drained = map[uint16]bool{}
	}
	for first, since := range u.retired {
		// A packet that was under way in the kernel when the block was retired has come out by then.
		if !inUse[first] && u.listed.Sub(since) >= drainEvery {
			u.drained[first] = true
		}
	}
}

// judge decides what to ask for, by what was counted. What is in use of retired blocks would have to have ports of a
// smaller one, should that be used again, so it counts against having fewer.
func (u *portUse) judge() {
	size := u.block.Size
	if !tooFew(u.all, size) {
		u.low = time.Time{}
	} else if u.low.IsZero() {
		u.low = u.listed
	}
	switch {
	case size == 0:
		u.want = 0
	case tooMany(u.most, size) && size < egress.MaxBlock:
		// A node has three blocks of an IP at most, and two of them may take long to drain: steps are to be large.
		for u.want = 2 * size; u.want < 2*u.all && u.want < egress.MaxBlock; u.want *= 2 {
		}
	case u.want > size && 2*u.most > size: // until it is clear that it is enough
	case !u.low.IsZero() && u.listed.Sub(u.low) >= lowFor && size > egress.MinBlock:
		u.want = max(size/4, egress.MinBlock)
	default:
		u.want = 0
	}
}

// report makes what was found out what the record of the agent says, and reports whether that has changed.
func (p *ports) report(now time.Time) bool {
	report, last := map[netip.Addr]egress.PortUse{}, make(map[netip.Addr]portCount, len(p.known))
	for _, u := range p.known {
		if u.block.Size > 0 && !u.listed.IsZero() {
			last[u.block.IP] = portCount{u.block, u.most}
		}
		use := egress.PortUse{Want: u.want, Drained: slices.Sorted(maps.Keys(u.drained))}
		if use.Want > 0 {
			use.Used = u.most
		}
		if use.Want > 0 || len(use.Drained) > 0 {
			report[u.blocks[0].IP] = use
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = last
	if samePorts(report, p.reported) || now.Sub(p.reportedAt) < reportEvery {
		return false
	}
	for ip, use := range report {
		if use.Want != p.reported[ip].Want && use.Want > 0 {
			p.log.Info("another block of ports asked for", "egress_ip", ip, "size", use.Want)
		}
	}
	p.reported, p.reportedAt = report, now
	return true
}

// samePorts reports whether both say the same to crdsync: Used is for people, and no reason to write a record.
func samePorts(a, b map[netip.Addr]egress.PortUse) bool {
	return maps.EqualFunc(a, b, func(a, b egress.PortUse) bool { return a.Want == b.Want && slices.Equal(a.Drained, b.Drained) })
}
