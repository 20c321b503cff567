package announce

import (
	"cmp"
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/packet"

	"github.com/egret-project/egret/egress"
)

// gaps are the times between the announcements of a new address: at 0, 1.1, 2.2 and 4.4 s. The first steps are longer
// than the second for which a neighbour holds on to what it took over last.
var gaps = []time.Duration{1100 * time.Millisecond, 1100 * time.Millisecond, 2200 * time.Millisecond}

const (
	// period is the time between the announcements that follow: a neighbour that missed all of the first ones is
	// mended, and the load of many addresses does not count.
	period = 5 * time.Minute
	// retry is the time until the next attempt when a frame could not be sent.
	retry = 1100 * time.Millisecond
)

// Config is what an Announcer works with.
type Config struct {
	Log *slog.Logger // nil: silent
	// Permitted reports whether this node may speak for the address now. It is asked right before each frame, from the
	// goroutines of Run; without a permit there is no frame.
	Permitted func(netip.Addr) bool
	// Changed is called when Conflicts changed. It must not block. nil: it is not called.
	Changed func()
}

// Announcer announces addresses, and listens for others that use them. Its methods may be called from any goroutine.
type Announcer struct {
	log       *slog.Logger
	permitted func(netip.Addr) bool
	changed   func()
	// sender returns what announces until end is called.
	sender func() (send func(link string, ip netip.Addr, permitted func(netip.Addr) bool) error, end func())
	// macOf returns the MAC address of a link; "": it is not known.
	macOf func(link string) string
	// listen begins to receive what other hosts send; follow sets for which addresses, and on which links.
	listen func(ctx context.Context) (follow func(list4, list6 map[netip.Addr]string), stop func())
	wake   chan struct{} // capacity 1: the schedule has changed

	mu       sync.Mutex
	schedule map[netip.Addr]*entry // guarded by mu

	macs map[string]string // of the links, as last seen; only Run uses it
}

// entry is one address that is announced.
type entry struct {
	link  string
	since time.Time
	due   time.Time // of the next announcement
	sent  int       // announcements so far
	err   string    // why the last one failed

	conflict Conflict      // another host that uses the address
	heard    time.Time     // when it was last heard
	defended time.Time     // when the address was last announced for that
	pause    time.Duration // from then to the next time at least
}

// New returns an Announcer that has nothing to announce. It starts nothing.
func New(cfg Config) *Announcer {
	a := &Announcer{
		log: cfg.Log, permitted: cfg.Permitted, changed: cfg.Changed, sender: newSender, macOf: macOf,
		wake: make(chan struct{}, 1), schedule: map[netip.Addr]*entry{}, macs: map[string]string{},
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.changed == nil {
		a.changed = func() {}
	}
	a.listen = a.open
	return a
}

// Set says which addresses are announced, and on which link each: an address that is new, or has another link, is
// announced at once and several times after; one that is not in want any more is withdrawn. Set does not block, and
// keeps no reference to want.
func (a *Announcer) Set(want map[netip.Addr]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for ip := range a.schedule {
		if _, ok := want[ip]; !ok {
			delete(a.schedule, ip)
		}
	}
	for ip, link := range want {
		if old := a.schedule[ip]; old != nil && old.link == link {
			continue
		}
		now := time.Now()
		a.schedule[ip] = &entry{link: link, since: now, due: now}
	}
	a.poke()
}

// poke wakes Run. It never blocks.
func (a *Announcer) poke() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// open opens the sockets of listen.
func (a *Announcer) open(ctx context.Context) (follow func(list4, list6 map[netip.Addr]string), stop func()) {
	r := ndpListener{log: a.log, heard: a.saw}
	l := listener{log: a.log, heard: a.saw, conns: map[int]*packet.Conn{}}
	follow = func(list4, list6 map[netip.Addr]string) {
		r.follow(ctx, list6)
		l.follow(ctx, list4)
	}
	return follow, func() { r.close(); l.close() }
}

// Run announces and listens until ctx ends, on the links of the network namespace of its goroutine, and returns nil
// then.
func (a *Announcer) Run(ctx context.Context) error {
	follow, stop := a.listen(ctx)
	defer stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.wake:
		case <-timer.C:
		}
		follow(a.links()) // first, for whoever hears the announcement may ask back
		a.lookAtMACs(time.Now())
		a.announce(ctx)
		a.expire()
		if next := a.next(); next.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(next))
		}
	}
}

// announce sends what is due.
func (a *Announcer) announce(ctx context.Context) {
	send, end := a.sender()
	defer end()
	for _, d := range a.due(time.Now()) {
		if ctx.Err() != nil {
			return
		}
		// Withdrawn while the ones before it were sent: as good as without a permit.
		permitted := func(ip netip.Addr) bool { return a.scheduled(ip, d.entry) && a.permitted(ip) }
		a.sent(d.ip, d.entry, send(d.link, d.ip, permitted))
	}
}

// lookAtMACs announces anew what is on a link that has got another MAC address, as a bridge or a bond may.
func (a *Announcer) lookAtMACs(now time.Time) {
	a.mu.Lock()
	seen := map[string]string{}
	for _, e := range a.schedule {
		seen[e.link] = ""
	}
	a.mu.Unlock()
	for link := range seen { // nobody waits for the kernel's answers
		seen[link] = cmp.Or(a.macOf(link), a.macs[link]) // one that is away may come back
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.schedule {
		if was, is := a.macs[e.link], seen[e.link]; was != "" && is != "" && was != is {
			e.since, e.due, e.sent = now, now, 0
		}
	}
	a.macs = seen
}

type due struct {
	ip   netip.Addr
	link string
	*entry
}

// due returns what is due at now, by address.
func (a *Announcer) due(now time.Time) []due {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []due
	for _, ip := range slices.SortedFunc(maps.Keys(a.schedule), netip.Addr.Compare) {
		if e := a.schedule[ip]; !e.due.After(now) {
			list = append(list, due{ip, e.link, e})
		}
	}
	return list
}

func (a *Announcer) scheduled(ip netip.Addr, e *entry) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.schedule[ip] == e
}

// links returns the addresses of either family, with the link of each.
func (a *Announcer) links() (list4, list6 map[netip.Addr]string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	list4, list6 = map[netip.Addr]string{}, map[netip.Addr]string{}
	for ip, e := range a.schedule {
		if ip.Is4() {
			list4[ip] = e.link
		} else if !strings.HasPrefix(e.link, egress.VLANLinkPrefix) {
			list6[ip] = e.link
		}
	}
	return list4, list6
}

// speaks reports whether this node speaks for ip on the link.
func (a *Announcer) speaks(link string, ip netip.Addr) bool {
	a.mu.Lock()
	e := a.schedule[ip]
	a.mu.Unlock()
	return e != nil && e.link == link && a.permitted(ip)
}

// sent notes that an announcement was made, or why not.
func (a *Announcer) sent(ip netip.Addr, e *entry, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.schedule[ip] != e {
		return // withdrawn, or begun anew
	}
	if err != nil {
		if e.err != err.Error() {
			a.log.Warn("not announced, will retry", "egress_ip", ip, "iface", e.link, "err", err)
		}
		e.err, e.due = err.Error(), time.Now().Add(retry)
		return
	}
	e.err = ""
	gap := period
	if e.sent < len(gaps) {
		gap = gaps[e.sent]
	}
	e.sent++
	e.due = e.due.Add(gap)
	if now := time.Now(); e.due.Before(now) {
		e.due = now.Add(gap) // woken up late, as after a suspend: never two at once
	}
}

// next returns when there is something to do by time alone; zero: never.
func (a *Announcer) next() (t time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, e := range a.schedule {
		if t.IsZero() || e.due.Before(t) {
			t = e.due
		}
		if end := e.heard.Add(conflictTime); e.conflict != (Conflict{}) && end.Before(t) {
			t = end
		}
	}
	return t
}
