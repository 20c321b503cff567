package ownership

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// simulate runs one schedule and returns what it violated; "" is nothing.
func simulate(seed uint64, opt options, story *strings.Builder) string {
	w := newWorld(seed, opt)
	w.story = story
	for _, n := range w.nodes {
		w.after(w.between(0, 100*time.Millisecond), n.boot)
	}
	if opt.script != nil {
		opt.script(w)
	} else {
		const calm = 3 * time.Second // the join grace ends
		w.end = calm + opt.faults
		if w.chance(2) {
			w.after(w.between(calm, w.end), func() { w.wait = 1 + w.N(6) })
		}
		if w.chance(2) {
			w.at = effectKind(w.N(int(effectKinds)))
		}
		for range 1 + w.N(8) {
			w.after(w.between(calm, w.end), w.fault)
		}
		w.run(calm)
	}
	w.run(w.now + opt.faults)
	w.heal()
	w.settle()
	return w.violation
}

// settle lets time pass until nothing changes any more, or for as long as that may take.
func (w *world) settle() {
	// Within a restart's grace, or the lease, and what a take-over takes.
	end := w.now + max(restartGrace, leaseTTL) + 6*time.Second
	for settled := false; !settled; {
		w.run(w.now + time.Second)
		fail := func(string, ...any) {}
		if w.now >= end {
			fail = w.fail
		}
		settled = w.settled(fail)
	}
}

// heal ends all faults, but for what one node may be left with.
func (w *world) heal() {
	w.say("all faults end")
	w.healed = true
	clear(w.cut)
	if w.opt.script == nil && w.chance(3) {
		w.leave(w.nodes[w.N(len(w.nodes))])
	}
	if w.etcd.down {
		for _, l := range w.etcd.leases {
			l.expires = w.now + l.ttl
		}
	}
	w.etcd.down, w.etcd.deposed = false, false
	if w.opt.labels {
		from := w.N(len(w.nodes))
		if w.broken != nil {
			from = 0 // so that another one can have the IPs
		}
		w.label(w.nodes[from:], true)
	}
	for _, n := range w.nodes {
		n.stalled, n.slow, n.broken = min(n.stalled, w.now), min(n.slow, w.now), min(n.broken, w.now)
		if n == w.broken {
			continue
		}
		n.frozen, n.off = min(n.frozen, w.now), false
		n.boot()
	}
	w.gossip()
	w.after(time.Second, w.gossip)
	w.after(3*time.Second, w.gossip)
}

// leave leaves a node as no fault ends: without power, frozen, or cut off from etcd; not from all others, too, since
// who joins then could not be reached, which is a premise.
func (w *world) leave(n *node) {
	w.broken = n
	switch w.N(3) {
	case 0:
		w.say("%s: power off for good", n.name)
		n.powerOff()
		n.gone = true
	case 1:
		w.say("%s: frozen for good", n.name)
		n.frozen = never
	case 2:
		w.say("network: nothing passes between %s and etcd, for good", n.name)
		w.lasting[[2]int{n.id, etcdEnd}], w.lasting[[2]int{etcdEnd, n.id}] = true, true
	}
}

// never is after the end of each schedule.
const never = time.Hour

// settled reports whether every IP has an owner, which answers, and nothing is written any more.
func (w *world) settled(fail func(format string, args ...any)) bool {
	if w.violation != "" {
		return true
	}
	for _, n := range w.nodes {
		if n == w.broken {
			continue
		}
		if n.m == nil || !n.running || n.kernel.until > w.now+n.permit && n.gossip {
			fail("%s does not run by the usual permits, long after all faults have ended", n.name)
			return false
		}
	}
	for _, ip := range w.ips {
		o, owned := w.etcd.owners[ip]
		if !owned {
			fail("nobody holds %s, long after all faults have ended", ip)
			return false
		}
		if n := w.nodes[o.Node[0]-'A']; !n.kernel.answers(ip) {
			fail("%s holds %s and does not answer for it, long after all faults have ended", n.name, ip)
			return false
		}
		for _, n := range w.nodes {
			if _, sends := n.kernel.list[ip]; sends && n.name != o.Node && w.now < n.kernel.until {
				fail("%s sends with %s of %s, long after all faults have ended", n.name, ip, o.Node)
				return false
			}
		}
	}
	writes, words := w.writes, w.words
	w.run(w.now + 500*time.Millisecond)
	if w.words != words && w.broken == nil {
		fail("agents said %d words while all is steady, long after all faults have ended", w.words-words)
		return false
	}
	if w.writes != writes {
		fail("etcd was written %d times while all is steady, long after all faults have ended", w.writes-writes)
		return false
	}
	return true
}

var (
	seeds    = flag.Int("schedules", 0, "how many schedules to run; 0: for as long as -schedules-time says")
	lasting  = flag.Duration("schedules-time", 5*time.Second, "for how long to run schedules")
	oneSeed  = flag.Uint64("schedule", 0, "the seed of one schedule, to be told as a story")
	restores = flag.Bool("schedules-restores", false, "with restores of etcd")
	toggles  = flag.Bool("schedules-toggle", false, "with gossip switched on and off")
	labels   = flag.Bool("schedules-labels", false, "with pools that select some nodes, and labels that change")
	silent   = flag.Bool("schedules-without-gossip", false, "without gossip")
	versions = flag.Bool("schedules-versions", false, "with agents of a version that knows no suspicions, and no leases in questions")
	mixed    = flag.Bool("schedules-mixed", false, "with different P")
	focus    = flag.String("schedules-focus", "", "what half of the faults are about: loss (of etcd), restore, suspicion, renewal")
	first    = flag.Bool("schedules-first", false, "end with the first schedule that fails")
	firstOne = flag.Uint64("schedules-from", 0, "the first seed; 0: a new one")
)

// usual are the options of a schedule from a seed. Without gossip nothing is said of permits after a restore of etcd.
func usual(seed uint64) options {
	kind := seed % 8
	some := seed%29 < 3 // whatever the kind
	opt := options{
		nodes: 5, faults: 4 * time.Second, focus: *focus, noGossip: kind == 0 || *silent, toggle: kind == 1 || *toggles,
		mixedP: kind == 2 || kind == 4 || *mixed, labels: some || *labels, versions: kind == 5 || *versions,
	}
	opt.restores = (kind == 3 || kind == 4 || *restores) && !opt.noGossip && !opt.toggle
	return opt
}

// TestSchedules runs schedules from new seeds.
func TestSchedules(t *testing.T) {
	if *oneSeed != 0 {
		var story strings.Builder
		v := simulate(*oneSeed, usual(*oneSeed), &story)
		t.Logf("seed %d: %s\n%s", *oneSeed, v, story.String())
		if v != "" {
			t.Fail()
		}
		return
	}
	begin := *firstOne
	if begin == 0 {
		begin = uint64(time.Now().UnixNano())
	}
	var next, failed atomic.Int64
	var mu sync.Mutex
	start := time.Now()
	kinds := map[string]int{}
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := next.Add(1) - 1
				if *first && failed.Load() > 0 || *seeds > 0 && i >= int64(*seeds) || *seeds == 0 && time.Since(start) > *lasting {
					next.Add(-1)
					return
				}
				seed := begin + uint64(i)
				v := simulate(seed, usual(seed), nil)
				if v == "" {
					continue
				}
				mu.Lock()
				kind := strings.Join(strings.Fields(v)[2:6], " ")
				if kinds[kind]++; kinds[kind] <= 1 || os.Getenv("ALL") != "" {
					fmt.Printf("seed %d: %s\n", seed, v)
				}
				mu.Unlock()
				if failed.Add(1) == 1 {
					var story strings.Builder
					simulate(seed, usual(seed), &story)
					t.Errorf("seed %d: %s\n%s", seed, v, story.String())
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d schedules in %v from seed %d, %d failed %v", next.Load(), time.Since(start).Round(time.Millisecond), begin, failed.Load(), kinds)
}
