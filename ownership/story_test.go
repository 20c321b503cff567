package ownership

import (
	"slices"
	"strings"
	"testing"
	"time"
)

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
			n.permit = 200 * time.Millisecond
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
