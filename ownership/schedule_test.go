package ownership

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// gossip lets every agent find out, some time later, who is alive.
func (w *world) gossip() {
	for _, n := range w.nodes {
		for _, o := range w.nodes {
			if n != o {
				slowest := 700 * time.Millisecond
				if w.chance(4) {
					slowest = 1800 * time.Millisecond
				}
				w.after(w.between(200*time.Millisecond, slowest), func() { n.hears(o) })
			}
		}
	}
}

func (n *node) hears(o *node) {
	if n.m == nil || !n.gossip {
		return
	}
	was := n.heard[o.id]
	is := was
	up := o.m != nil && o.gossip && n.w.now >= o.frozen && n.w.reaches(n.id, o.id) && n.w.reaches(o.id, n.id)
	switch {
	case up:
		is = alive
	case was == alive:
		is = dead
	}
	if is != was {
		n.w.say("%s: gossip says that %s is %s", n.name, o.name, [...]string{"unknown", "alive", "left", "dead"}[is])
		n.heard[o.id] = is
		n.wake()
	}
}

// focuses are faults that have to come together for some mistakes to be found, by what that is about.
var focuses = map[string][]int{"loss": {10, 16}, "restore": {12, 17}, "suspicion": {3, 18}}

// fault does one thing that can happen to a cluster.
func (w *world) fault() {
	n := w.nodes[w.N(len(w.nodes))]
	long := w.between(50*time.Millisecond, 4*time.Second)
	if w.chance(2) {
		for _, o := range w.nodes { // most of what can go wrong is about who holds an IP
			if len(o.kernel.list) > 0 && w.chance(2) {
				n = o
			}
		}
	}
	if w.opt.labels && w.chance(3) {
		w.relabel(n)
		return
	}
	kind := w.N(19)
	if w.opt.focus != "" && w.chance(2) {
		kind = focuses[w.opt.focus][w.N(len(focuses[w.opt.focus]))]
	}
	switch kind {
	case 0:
		n.kill("by a fault")
		w.after(w.between(0, 2*time.Second), n.boot)
	case 1:
		n.stop()
		w.after(w.between(time.Second, 4*time.Second), n.boot)
	case 2:
		w.say("%s: power off for %v", n.name, long)
		n.powerOff()
		w.after(long, func() { n.off = false; n.boot() })
	case 3, 4:
		w.say("%s: frozen for %v", n.name, long)
		n.frozen = w.now + long
		w.gossip()
		w.after(long, w.gossip)
	case 5:
		w.partition(n.id, etcdEnd, long, w.chance(2), w.chance(2))
	case 6:
		w.partition(n.id, etcdEnd, long, true, true)
		for _, o := range w.nodes {
			if o != n && w.chance(2) {
				w.partition(n.id, o.id, long, true, true)
			}
		}
	case 7:
		o := w.nodes[w.N(len(w.nodes))]
		w.partition(n.id, o.id, long, w.chance(2), true)
	case 8:
		w.say("%s: its requests to etcd may take long for %v", n.name, long)
		n.slow = w.now + long
	case 9:
		w.say("etcd: no answers for %v", long)
		w.etcd.down = true
		term := w.etcd.term
		w.after(long, func() {
			if w.etcd.term == term {
				w.say("etcd: answers again")
				w.etcd.down = false
				for id := range w.etcd.leases {
					w.etcd.leases[id].expires = w.now + w.etcd.leases[id].ttl
				}
				w.watchers()
			}
		})
	case 10:
		for _, o := range w.nodes {
			if o.m != nil && o.heard[n.id] == alive && w.chance(2) {
				w.say("%s: gossip says falsely that %s is dead", o.name, n.name)
				o.heard[n.id] = dead
				o.wake()
			}
		}
		w.after(long/4, w.gossip)
	case 11:
		w.say("%s: writes to its kernel fail for %v", n.name, long)
		n.broken = w.now + long
		if w.chance(2) {
			n.kill("by a fault")
			w.after(w.between(0, time.Second), n.boot)
		}
	case 12:
		w.say("%s: its watch says nothing for %v", n.name, long)
		n.stalled = w.now + long
	case 13, 14:
		ip := w.ips[w.N(len(w.ips))]
		w.say("operator: move %s to %s", ip, n.name)
		w.etcd.requestMove(ip, n.name, 3*time.Second)
	case 15:
		if w.opt.restores && w.backup != nil && !w.stopped() {
			w.say("etcd: restored to revision %d", w.backup.rev)
			w.etcd.restore(w.backup)
			return
		}
		if w.opt.noGossip || w.opt.toggle {
			return // a lease is all that they have
		}
		w.say("etcd: its leader is cut off, and grants renewals, for %v", long)
		w.etcd.deposed = true
		w.after(long, func() { w.etcd.deposed = false })
	case 16:
		// Etcd is lost for all but a few, some of which come just then.
		for _, o := range w.nodes {
			switch {
			case w.N(5) > 0:
				w.partition(o.id, etcdEnd, long+w.between(0, 500*time.Millisecond), true, true)
			case w.chance(2):
				w.say("%s: power off for a while", o.name)
				o.powerOff()
				w.after(w.between(0, long), func() { o.off = false; o.boot() })
			}
		}
	case 17:
		if !w.opt.restores {
			return
		}
		w.say("etcd: a backup of revision %d, to which it is restored in a moment", w.etcd.rev)
		backup := w.etcd.backup()
		for _, ip := range w.ips {
			w.etcd.requestMove(ip, n.name, 3*time.Second)
		}
		w.after(w.between(20*time.Millisecond, 500*time.Millisecond), func() {
			if !w.stopped() {
				w.say("etcd: restored to revision %d", backup.rev)
				w.etcd.restore(backup)
			}
		})
	}
	if kind == 18 {
		// Somebody who lives is held for dead, and something happens to it while it says that it lives.
		w.say("gossip: all are told falsely that %s is dead", n.name)
		for _, o := range w.nodes {
			if o.m != nil && o != n && w.N(4) > 0 {
				o.heard[n.id] = dead
				o.wake()
			}
		}
		if w.chance(2) {
			w.say("%s: its requests to etcd may take long for %v", n.name, long)
			n.slow = w.now + long
		}
		w.after(w.between(0, 600*time.Millisecond), func() {
			switch w.N(4) {
			case 0:
				n.stop()
			case 1:
				n.kill("while it was suspected")
			case 2:
				w.partition(n.id, etcdEnd, long, w.chance(2), true)
				return
			}
			w.after(w.between(0, time.Second), n.boot)
		})
		w.after(long, w.gossip)
	}
	if w.opt.restores && w.chance(3) {
		w.say("etcd: a backup of revision %d", w.etcd.rev)
		w.backup = w.etcd.backup()
	}
}

// relabel changes which nodes the pool selects: one of them, for good or for a moment that its agent may not see, or
// all.
func (w *world) relabel(n *node) {
	is := len(w.base.Nodes[n.name].Labels) > 0
	switch w.N(4) {
	case 0:
		w.label(w.nodes, true)
	case 1:
		w.label(w.nodes, false)
		w.label(w.nodes[w.N(len(w.nodes)):], true)
	case 2:
		w.after(w.between(0, 2*time.Second), func() {
			if !w.healed {
				w.label([]*node{n}, is)
			}
		})
		fallthrough
	default:
		w.label([]*node{n}, !is)
	}
}

// stopped reports whether a kernel has permits that outlive the lease that an older etcd would know, or is about to.
func (w *world) stopped() bool {
	for _, n := range w.nodes {
		if n.stopping || n.kernel.until > w.now+n.permit {
			return true
		}
	}
	return false
}

func (w *world) partition(a, b int, d time.Duration, to, from bool) {
	if a == b || w.healed {
		return
	}
	name := func(i int) string {
		if i == etcdEnd {
			return "etcd"
		}
		return w.nodes[i].name
	}
	if to {
		w.say("network: nothing passes from %s to %s for %v", name(a), name(b), d)
		w.cut[[2]int{a, b}] = true
	}
	if from {
		w.say("network: nothing passes from %s to %s for %v", name(b), name(a), d)
		w.cut[[2]int{b, a}] = true
	}
	w.gossip()
	w.after(d, func() {
		delete(w.cut, [2]int{a, b})
		delete(w.cut, [2]int{b, a})
		w.gossip()
	})
}

// simulate runs one schedule and returns what it violated; "" is nothing.
func simulate(seed uint64, opt options, story *strings.Builder) string {
	w := newWorld(seed, opt)
	w.story = story
	for _, n := range w.nodes {
		n.kernel.w = w
		w.after(w.between(0, 100*time.Millisecond), n.boot)
	}
	if opt.script != nil {
		opt.script(w)
	} else {
		const calm = 3 * time.Second // the join grace ends
		if w.chance(2) {
			w.after(w.between(calm, calm+opt.faults), func() { w.wait = 1 + w.N(6) })
		}
		for range 1 + w.N(8) {
			w.after(w.between(calm, calm+opt.faults), w.fault)
		}
		w.run(calm)
	}
	w.run(w.now + opt.faults)
	w.heal()
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
	return w.violation
}

// heal ends all faults.
func (w *world) heal() {
	w.say("all faults end")
	w.healed = true
	clear(w.cut)
	if w.etcd.down {
		for _, l := range w.etcd.leases {
			l.expires = w.now + l.ttl
		}
	}
	w.etcd.down, w.etcd.deposed = false, false
	if w.opt.labels {
		w.label(w.nodes[w.N(len(w.nodes)):], true)
	}
	for _, n := range w.nodes {
		n.frozen, n.stalled, n.slow, n.broken, n.off = min(n.frozen, w.now), min(n.stalled, w.now), min(n.slow, w.now), min(n.broken, w.now), false
		n.boot()
	}
	w.gossip()
	w.after(time.Second, w.gossip)
	w.after(3*time.Second, w.gossip)
}

// settled reports whether every IP has an owner, which answers, and nothing is written any more.
func (w *world) settled(fail func(format string, args ...any)) bool {
	if w.violation != "" {
		return true
	}
	for _, n := range w.nodes {
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
	}
	writes := w.writes
	w.run(w.now + 500*time.Millisecond)
	if w.writes != writes {
		fail("etcd was written %d times while all is steady, long after all faults have ended", w.writes-writes)
		return false
	}
	return true
}

// trigger lets something happen to who is about to change etcd.
func (w *world) trigger(n *node) {
	if w.wait == 0 || w.healed {
		return
	}
	if w.wait--; w.wait > 0 {
		return
	}
	long := w.between(50*time.Millisecond, 3*time.Second)
	if w.chance(2) {
		w.say("%s: its requests to etcd may take long for %v", n.name, long)
		n.slow = w.now + long
	}
	w.after(w.between(0, 4*time.Millisecond), func() {
		if w.healed {
			return
		}
		kind := w.N(6)
		if w.opt.focus == "loss" {
			kind = 5
		}
		switch kind {
		case 0, 1:
			n.kill("in the middle of a change")
			w.after(w.between(0, 500*time.Millisecond), n.boot)
		case 2:
			n.stop()
			w.after(w.between(time.Second, 2*time.Second), n.boot)
		case 3:
			w.say("%s: frozen for %v", n.name, long)
			n.frozen = w.now + long
			w.gossip()
			w.after(long, w.gossip)
		case 4:
			w.partition(n.id, etcdEnd, long, w.chance(2), true)
		case 5:
			for _, o := range w.nodes {
				w.partition(o.id, etcdEnd, long, true, true)
			}
		}
	})
}

var (
	seeds    = flag.Int("schedules", 0, "how many schedules to run; 0: for as long as -schedules-time says")
	lasting  = flag.Duration("schedules-time", 5*time.Second, "for how long to run schedules")
	oneSeed  = flag.Uint64("schedule", 0, "the seed of one schedule, to be told as a story")
	restores = flag.Bool("schedules-restores", false, "with restores of etcd")
	toggles  = flag.Bool("schedules-toggle", false, "with gossip switched on and off")
	labels   = flag.Bool("schedules-labels", false, "with pools that select some nodes, and labels that change")
	mixed    = flag.Bool("schedules-mixed", false, "with different P")
	focus    = flag.String("schedules-focus", "", "what half of the faults are about: loss (of etcd), restore, suspicion")
	first    = flag.Bool("schedules-first", false, "end with the first schedule that fails")
	firstOne = flag.Uint64("schedules-from", 0, "the first seed; 0: a new one")
)

// usual are the options of a schedule from a seed.
func usual(seed uint64) options {
	kind := seed % 8
	some := seed%29 < 3 // whatever the kind
	return options{
		nodes: 5, faults: 4 * time.Second, focus: *focus, noGossip: kind == 0, toggle: kind == 1 || *toggles,
		mixedP: kind == 2 || kind == 4 || *mixed, restores: kind == 3 || kind == 4 || *restores, labels: some || *labels,
	}
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

// A node joins while all others have lost etcd. It claims what they hold by their promises: they hear of it by the
// gossip, and have to ask it, too.
func TestWhoJoinsWhileTheOthersHaveLostEtcdHasToPromise(t *testing.T) {
	claimed := 0
	for seed := range uint64(200) {
		var story strings.Builder
		others := 1 + 3*int(seed%2)
		v := simulate(seed, options{nodes: others + 1, faults: 8 * time.Second, script: func(w *world) {
			late := w.nodes[others]
			late.off = true
			late.life++
			w.run(3 * time.Second)
			for _, n := range w.nodes[:others] {
				w.partition(n.id, etcdEnd, 7*time.Second, true, true)
			}
			// Before and after the others' leases end.
			w.after(w.between(leaseTTL/2, leaseTTL*5/4), func() { late.off = false; late.boot() })
			w.after(6900*time.Millisecond, func() {
				if w.etcd.owners[w.ips[0]].Node == late.name {
					claimed++
				}
			})
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	if claimed < 100 {
		t.Errorf("of 200 nodes that joined %d have claimed what the others lost, want half of them", claimed)
	}
}

// A move's target ceases to be a gateway while the hand-over is under way. So its former owner may see a snapshot that
// is older than the hand-over, and has no move any more.
func TestWhatWasHandedOverIsNotUsedByAnOlderSnapshot(t *testing.T) {
	moved := 0
	for seed := range uint64(2000) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 3, faults: 4 * time.Second, labels: true, script: func(w *world) {
			w.run(3 * time.Second)
			ip := w.ips[0]
			owner := slices.IndexFunc(w.nodes, func(n *node) bool { return n.name == w.etcd.owners[ip].Node })
			if owner < 0 {
				return
			}
			former, target := w.nodes[owner], w.nodes[(owner+1)%len(w.nodes)]
			w.label(w.nodes, true)
			w.after(100*time.Millisecond, func() { w.etcd.requestMove(ip, target.name, 3*time.Second) })
			var ready func()
			ready = func() {
				if !w.etcd.moves[ip].Ready && w.etcd.owners[ip].Node == former.name {
					w.after(time.Millisecond, ready)
					return
				}
				w.after(w.between(0, 50*time.Millisecond), func() {
					w.label([]*node{target}, false)
					w.after(w.between(0, 100*time.Millisecond), func() {
						if o := w.etcd.owners[ip]; o.From == former.name || o.Node == target.name {
							moved++
						}
					})
				})
			}
			w.after(101*time.Millisecond, ready)
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	if moved < 200 {
		t.Errorf("of 2,000 moves %d were done as their target ceased to be a gateway, want a tenth of them", moved)
	}
}

// An agent's lease is lost, with its record, before all others lose etcd: their last snapshot does not have it, and the
// gossip says that it is dead. It gets a new lease, and claims what they hold by their promises before the gossip has
// told them that it is back.
func TestWhoJoinsAgainWhileTheOthersHaveLostEtcdHasToPromise(t *testing.T) {
	claimed := 0
	for seed := range uint64(200) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 2 + 2*int(seed%2), faults: 10 * time.Second, script: func(w *world) {
			w.run(3 * time.Second)
			owner := slices.IndexFunc(w.nodes, func(n *node) bool { return n.name == w.etcd.owners[w.ips[0]].Node })
			if owner < 0 {
				return
			}
			again := w.nodes[(owner+1)%len(w.nodes)]
			former := w.etcd.agents[again.name].Lease
			away := leaseTTL + 500*time.Millisecond
			w.partition(again.id, etcdEnd, away, true, true)
			w.after(away-time.Second, func() { w.partition(again.id, owner, 4*time.Second, true, true) })
			w.after(w.between(away-300*time.Millisecond, away), func() {
				for _, n := range w.nodes {
					if n != again {
						w.partition(n.id, etcdEnd, 5*time.Second, true, true)
					}
				}
			})
			var back func()
			back = func() {
				if r, there := w.etcd.agents[again.name]; !there || r.Lease == former {
					w.after(10*time.Millisecond, back)
					return
				}
				delete(w.cut, [2]int{again.id, owner})
				delete(w.cut, [2]int{owner, again.id})
				w.gossip()
			}
			back()
			w.after(away+4*time.Second, func() {
				if w.etcd.owners[w.ips[0]].Node == again.name {
					claimed++
				}
			})
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	if claimed < 50 {
		t.Errorf("of 200 agents that joined again %d have claimed what the others hold, want a quarter of them", claimed)
	}
}

// The owner's P is longer than the claimer's, and etcd has not taken that yet. The owner is frozen, and the claimer,
// for which it is dead, waits its own.
func TestAPermitIsNoLongerThanClaimersKnow(t *testing.T) {
	for seed := range uint64(50) {
		var story strings.Builder
		w := newWorld(seed, options{nodes: 3, noLongest: true})
		w.story = &story
		for _, n := range w.nodes {
			n.kernel.w, n.permit = w, 200*time.Millisecond
			n.boot()
		}
		owner := w.nodes[0]
		owner.permit = time.Second
		owner.kill("its P is another one")
		owner.boot()
		w.run(5 * time.Second)
		for _, n := range w.nodes {
			for _, ip := range w.ips {
				if w.etcd.owners[ip].Node == n.name && n.kernel.answers(ip) {
					t.Fatalf("seed %d: %s answers for %s, and nobody knows for how long", seed, n.name, ip)
				}
			}
		}
		// Now etcd has the P of the others.
		w.opt.noLongest = false
		w.etcd.setLongest(Longest{Permit: 200 * time.Millisecond, Raise: true}, w.etcd.rev)
		w.opt.noLongest = true
		for range 20 {
			w.run(w.now + 100*time.Millisecond)
			if owner.kernel.until > w.now && len(owner.kernel.list) > 0 {
				t.Fatalf("seed %d: the one with the longer P answers, and claimers wait less long", seed)
			}
		}
		if w.violation != "" {
			t.Fatalf("seed %d: %s\n%s", seed, w.violation, story.String())
		}
	}
}

// The smallest cluster: whichever of two nodes loses power, the other is half of all. It took the lease's whole time to
// find out.
func TestWhicheverOfTwoNodesLosesPowerTheOtherTakesOver(t *testing.T) {
	var took []time.Duration
	died := map[string]int{}
	for seed := range uint64(100) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 2, faults: 5 * time.Second, script: func(w *world) {
			w.run(4 * time.Second)
			ip := w.ips[0]
			w.etcd.requestMove(ip, w.nodes[seed%2].name, 3*time.Second)
			w.run(6 * time.Second)
			owner := w.nodes[w.etcd.owners[ip].Node[0]-'A']
			other := w.nodes[1-owner.id]
			died[owner.name]++
			off := w.now
			owner.powerOff()
			var heard time.Duration
			for !other.kernel.answers(ip) && w.now < off+4*time.Second {
				if heard == 0 && other.heard[owner.id] == dead {
					heard = w.now
				}
				w.run(w.now + time.Millisecond)
			}
			took = append(took, w.now-heard)
			owner.off = false
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	slices.Sort(took)
	if p50, p90 := took[len(took)/2], took[len(took)*9/10]; p50 > permitLength+100*time.Millisecond || p90 > permitLength+400*time.Millisecond || len(died) != 2 {
		t.Errorf("from the gossip's word to the first answer: p50 %v, p90 %v, want P (%v) and what etcd and the kernel take; died %v, want each now and then", p50, p90, permitLength, died)
	} else {
		t.Logf("p50 %v, p90 %v, longest %v; died %v", p50, p90, took[len(took)-1], died)
	}
}

// The gateways are cut off from etcd and from all other nodes, and the operator makes another node one. Its agent had
// to promise all along: if only gateways had to, the others would go on by their promises for as long as the network is
// cut.
func TestWhoBecomesAGatewayWhileTheOthersAreCutOffHasToPromise(t *testing.T) {
	for seed := range uint64(20) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 5, faults: 12 * time.Second, labels: true, script: func(w *world) {
			w.label(w.nodes, false)
			w.label(w.nodes[:2], true)
			w.run(3 * time.Second)
			for _, n := range w.nodes[:2] {
				for _, o := range []int{etcdEnd, 2, 3, 4} {
					w.partition(n.id, o, 11*time.Second, true, true)
				}
			}
			w.after(time.Second, func() { w.label(w.nodes[2:3], true) })
			w.after(10*time.Second, func() {
				if n := w.nodes[2]; !n.kernel.answers(w.ips[0]) {
					w.fail("the new gateway does not answer for %s, for 9 s", w.ips[0])
				}
			})
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
}

// A gateway claims, and the request takes long; meanwhile its pool selects it no more, so that it need not see all
// owners any longer. Etcd then gives it the lock: if it did not see that, nobody would answer for the IP.
func TestALateClaimOfAFormerGatewayIsSeen(t *testing.T) {
	claimLate(t, 1, 6*time.Second, 4*time.Second, 0)
}

// The same, and the view stands still while the claim arrives, for longer than one may take.
func TestALateClaimThatTheViewDoesNotShowIsFound(t *testing.T) {
	claimLate(t, 3, 7*time.Second, 3*time.Second, 4*time.Second) // none of that node's pods uses an egress IP
}

// claimLate runs schedules in which the claim of a node arrives when no pool selects it any more. That is so at most
// after a time, and its view stands still then for another one; 0: it does not.
func claimLate(t *testing.T, former int, faults, after, still time.Duration) {
	t.Helper()
	late := 0
	for seed := range uint64(300) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 5, faults: faults, labels: true, script: func(w *world) {
			n := w.nodes[former]
			own := w.nodes[former : former+1]
			w.label(w.nodes, false)
			w.label(w.nodes[:1], true)
			w.run(4 * time.Second)
			if !n.partial {
				w.fail("%s sees all owners, and can claim nothing", n.name)
			}
			w.label(own, true)
			w.run(4800 * time.Millisecond)
			if n.partial {
				w.fail("%s does not see all owners, and can claim", n.name)
			}
			n.slow = w.now + 5*time.Second
			w.nodes[0].powerOff()
			w.after(w.between(500*time.Millisecond, after), func() {
				_, owned := w.etcd.owners[w.ips[0]]
				w.label(own, false)
				if still > 0 {
					w.after(20*time.Millisecond, func() { n.stalled = w.now + still })
				}
				w.after(2*time.Second, func() {
					if o := w.etcd.owners[w.ips[0]]; !owned && o.Node == n.name {
						late++
					}
				})
			})
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	if late == 0 {
		t.Error("no claim was late")
	}
}

// A former gateway sees some owners alone, and etcd is restored to when it held the IP: of that its view says nothing.
func TestAFormerGatewaySeesWhatItHoldsInARestoredEtcd(t *testing.T) {
	for seed := range uint64(60) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 5, faults: 3 * time.Second, labels: true, restores: true, script: func(w *world) {
			d := w.nodes[3] // none of its pods uses an egress IP
			w.label(w.nodes, false)
			w.label(w.nodes[3:4], true)
			w.run(4 * time.Second)
			backup := w.etcd.backup()
			w.label(w.nodes[:1], true)
			w.label(w.nodes[3:4], false)
			w.run(w.now + 5*time.Second)
			if o := backup.owners[w.ips[0]]; o.Node != d.name || !d.partial {
				w.fail("%s held %s: want %s, which sees some owners alone: %t", o.Node, w.ips[0], d.name, d.partial)
			}
			w.etcd.restore(backup)
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
}

// A gateway that got the IP by a move, as the backup has it, is none any more and sees some owners alone when all lose
// etcd. Restored, etcd gives it the IP again, and it is selected again, while the other gateway, to which it promised,
// has not found etcd yet.
func TestAFormerGatewayThatIsOneAgainInARestoredEtcdWaitsForTheOther(t *testing.T) {
	waited := 0
	for seed := range uint64(200) {
		var story strings.Builder
		v := simulate(seed, options{nodes: 5, faults: 8 * time.Second, labels: true, restores: true, script: func(w *world) {
			g, d, ip := w.nodes[0], w.nodes[3], w.ips[0]
			w.label(w.nodes, false)
			w.label(w.nodes[:1], true)
			w.run(3 * time.Second)
			w.label(w.nodes[3:4], true)
			w.run(6 * time.Second)
			w.etcd.requestMove(ip, d.name, 3*time.Second)
			w.run(8 * time.Second)
			backup := w.etcd.backup()
			w.label(w.nodes[3:4], false)
			w.run(15 * time.Second)
			if o := backup.owners[ip]; o.Node != d.name || o.From != g.name || w.etcd.owners[ip].Node != g.name || !d.partial {
				return
			}
			for _, n := range w.nodes {
				w.partition(n.id, etcdEnd, 2*time.Second, true, true)
			}
			w.partition(g.id, etcdEnd, 4*time.Second, true, true)
			w.after(w.between(1500*time.Millisecond, 2*time.Second), func() {
				waited++
				w.etcd.restore(backup)
				w.label(w.nodes[3:4], true)
			})
		}}, &story)
		if v != "" {
			t.Fatalf("seed %d: %s\n%s", seed, v, story.String())
		}
	}
	if waited < 100 {
		t.Errorf("of 200 gateways that were none any more %d were restored, want half of them", waited)
	}
}
