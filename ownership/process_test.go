package ownership

import (
	"net/netip"
	"slices"
	"time"

	"github.com/egret-project/egret/egress"
)

// boot starts an agent.
func (n *node) boot() {
	if n.m != nil || n.off || n.gone {
		return
	}
	if n.w.now < n.paused {
		n.w.after(n.paused-n.w.now, n.boot)
		return
	}
	n.life++
	n.running, n.stopping, n.busy, n.dirty, n.view, n.asking, n.frozen, n.backoff = false, false, false, false, nil, 0, 0, 0
	n.viewTerm, n.viewRestores, n.head, n.restores, n.resting, n.unanswered = 0, 0, head{}, 0, false, false
	n.listed, n.partial, n.widening = nil, false, false
	if n.w.opt.mixedP {
		n.permit = []time.Duration{200 * time.Millisecond, permitLength, time.Second}[n.w.N(3)]
	}
	n.kernel.queue, n.kernel.used, n.kernel.exact, n.renewalDue = nil, false, false, false
	for i := range n.heard {
		n.heard[i] = unknown
	}
	n.old = n.old && n.w.chance(2) // it is a newer one at some time, and none is older than the one before it
	if n.w.opt.toggle && n.w.chance(2) {
		n.gossip = !n.gossip
	}
	n.m = New(Config{
		Node: n.name, Permit: n.permit, ClaimDelay: claimDelay, Linger: lingerTime, Gossip: n.gossip, Freeze: n.gossip,
		Process: n.w.Uint64(), Start: n.clock(), Late: lateTime,
	})
	n.w.say("%s: agent begins", n.name)
	n.w.gossip()
	again := func() {
		n.kill("the start failed")
		n.w.after(n.w.between(50*time.Millisecond, 500*time.Millisecond), n.boot)
	}
	n.start(again)
}

// start is agent.start: the former agent's lease and permits, or a new lease.
func (n *node) start(again func()) {
	var former egress.Agent
	var there bool
	n.ask(5*time.Second, func(e *etcd) { former, there = e.agents[n.name] }, func(ok bool) {
		if !ok {
			again()
			return
		}
		if !there {
			n.newLease(again, n.loops)
			return
		}
		id, _ := egress.ParseLease(former.Lease) // it wrote one
		kept, sent := false, n.clock()
		var ttl time.Duration
		n.ask(5*time.Second, func(e *etcd) {
			if kept = e.renew(id); kept {
				ttl = e.leases[id].ttl
			}
		}, func(ok bool) {
			switch {
			case !ok:
				again()
			case !kept:
				n.newLease(again, n.loops)
			default:
				n.adopt(former, Granted{Lease: id, Sent: sent, TTL: ttl}, again)
			}
		})
	})
}

func (n *node) newLease(again, then func()) {
	sent := n.clock()
	var id int64
	n.ask(5*time.Second, func(e *etcd) { id = e.grant(leaseTTL) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		n.w.say("%s: new lease %x", n.name, id)
		n.step(Granted{Lease: id, Sent: sent, TTL: leaseTTL})
		then()
	})
}

func (n *node) adopt(former egress.Agent, g Granted, again func()) {
	leftOver := map[netip.Addr]bool{}
	if n.w.now < n.kernel.until {
		for ip := range n.kernel.list {
			leftOver[ip] = n.kernel.list[ip]
		}
	}
	var held []netip.Addr
	n.ask(5*time.Second, func(e *etcd) { held = e.owned(g.Lease) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		resume := func(g Granted) {
			n.w.say("%s: adopts lease %x", n.name, g.Lease)
			n.step(g)
			n.confirm(func(ok bool) {
				if !ok {
					again()
					return
				}
				n.resume(former, held, leftOver)
			})
		}
		if !former.Restarting {
			// What the former process has sent may arrive yet.
			var ok bool
			n.w.trigger(n, atStart)
			n.ask(5*time.Second, func(e *etcd) { ok = e.renumber(g.Lease, n.name, held) }, func(came bool) {
				if !came || !ok {
					again()
					return
				}
				resume(g)
			})
			return
		}
		n.shorten(former, g, held, leftOver, again, resume)
	})
}

// resume renews the permits that the kernel still has for what this node holds, at once.
func (n *node) resume(former egress.Agent, held []netip.Addr, leftOver map[netip.Addr]bool) {
	var list []Permit
	var ips, gone []netip.Addr
	for _, ip := range n.w.ips {
		if !leftOver[ip] {
			continue
		}
		if slices.Contains(held, ip) {
			list, ips = append(list, Permit{IP: ip, Answer: true}), append(ips, ip)
		} else {
			gone = append(gone, ip)
		}
	}
	n.step(Adopted{IPs: ips, Revocable: former.Revocable, Permit: time.Duration(former.Permit)})
	n.do(func(free func()) {
		n.revoke(gone, nil, func(error) {
			n.kernel.exact = n.kernel.same(list)
			n.m.Grant(list, n.kernel.exact)
			n.write(func(error) { free(); n.loops() })
		})
	})
}

// shorten moves the locks from a lease that was to outlive the restart to one of the usual length.
func (n *node) shorten(former egress.Agent, g Granted, held []netip.Addr, leftOver map[netip.Addr]bool, again func(), then func(Granted)) {
	next := Granted{Sent: n.clock(), TTL: leaseTTL}
	n.w.trigger(n, atStart)
	n.ask(5*time.Second, func(e *etcd) { next.Lease = e.grant(leaseTTL) }, func(ok bool) {
		if !ok {
			again()
			return
		}
		most := next.Sent.Add(next.TTL).Sub(n.clock())
		var cut []Permit
		for _, ip := range held {
			if leftOver[ip] && n.kernel.until-n.w.now > n.span(most) {
				cut = append(cut, Permit{IP: ip, Answer: true})
			}
		}
		move := func() {
			n.moveTo(g.Lease, next.Lease, former, func(netip.Addr) bool { return true }, func(rest func()) { rest() }, func(ok bool) {
				if !ok {
					again()
					return
				}
				then(next)
			})
		}
		if len(cut) == 0 {
			move()
			return
		}
		if n.w.now < n.broken {
			again()
			return
		}
		life := n.life
		n.after(n.w.between(0, 2*time.Millisecond), func() {
			if n.life != life && n.w.chance(2) {
				return
			}
			n.kernel.list = map[netip.Addr]bool{}
			for _, p := range cut {
				n.kernel.list[p.IP] = p.Answer
			}
			n.kernel.until = n.w.now + n.span(most)
			n.w.say("%s: kernel's permits %s are cut to %v", n.name, permitNames(cut), most.Round(time.Millisecond))
		})
		n.in(2*time.Millisecond, move)
	})
}

// moveTo is store.Lease.MoveTo. moved is called once the record has moved, and calls its argument.
func (n *node) moveTo(from, to int64, a egress.Agent, keep func(netip.Addr) bool, moved func(func()), done func(bool)) {
	round := 0
	var again func()
	again = func() {
		if round++; round > 2 {
			done(true)
			return
		}
		var ips []netip.Addr
		var seen int64
		n.w.trigger(n, atMove)
		n.ask(time.Second, func(e *etcd) { ips, seen = e.owned(from), e.recordRev[a.Node] }, func(ok bool) {
			switch {
			case !ok:
				done(false)
			case round == 2 && len(ips) == 0:
				done(true)
			default:
				kept := map[netip.Addr]bool{} // as of the request
				for _, ip := range ips {
					kept[ip] = keep(ip)
				}
				n.endLeft(kept, func() {
					keep := func(ip netip.Addr) bool { return kept[ip] }
					var did bool
					n.w.trigger(n, atMove)
					if round == 2 {
						n.ask(time.Second, func(e *etcd) { did = e.moveLocks(from, to, a.Node, seen, ips, keep) }, func(ok bool) { done(ok && did) })
						return
					}
					n.ask(time.Second, func(e *etcd) {
						did = e.moveTo(from, to, a, seen, ips, keep)
						n.w.say("%s: moves its locks %v from lease %x to %x: %t", n.name, ips, from, to, did)
					}, func(ok bool) {
						if !ok || !did {
							done(false)
							return
						}
						moved(again)
					})
				})
			}
		})
	}
	again()
}

// endLeft ends the permits of the locks that are not kept, and keeps those where that fails.
func (n *node) endLeft(kept map[netip.Addr]bool, done func()) {
	var left []netip.Addr
	for _, ip := range n.w.ips {
		if keeps, ours := kept[ip]; ours && !keeps {
			left = append(left, ip)
		}
	}
	if len(left) == 0 {
		done()
		return
	}
	n.narrow(func(ip netip.Addr) (send, answer bool) {
		stays := !slices.Contains(left, ip)
		return stays, stays
	}, func(err error) {
		for _, ip := range left {
			kept[ip] = err != nil
		}
		done()
	})
}

// kill ends the process at once.
func (n *node) kill(why string) {
	if n.m == nil {
		return
	}
	n.w.say("%s: agent killed (%s)", n.name, why)
	if n.unsure() {
		n.woken = max(n.woken, n.kernel.until)
	}
	n.pausedAt = time.Time{}
	n.life++
	n.m = nil
	n.kernel.queue, n.kernel.used, n.kernel.exact = nil, false, false
	n.w.gossip()
}

// powerOff takes everything along.
func (n *node) powerOff() {
	n.kill("power off")
	n.off = true
	n.losses++
	n.kernel.list, n.kernel.until, n.woken = nil, 0, 0
}

// stop is what SIGTERM does: the locks go to a lease that outlives the restart, and the permits last as long.
func (n *node) stop() {
	if n.m == nil || n.stopping || !n.running {
		return
	}
	if n.w.now < n.paused {
		n.w.after(n.paused-n.w.now, n.stop)
		return
	}
	n.w.say("%s: agent is told to stop", n.name)
	n.stopping = true
	if !n.busy {
		n.handOn()
	}
}

// exit ends a process that says so to its peers. When the faults have ended, it is started again at once: what was to
// start it may have come before the end of a slow exit.
func (n *node) exit(why string) {
	n.kill(why)
	if n.w.healed {
		n.w.after(time.Second, n.boot)
	}
	for _, o := range n.w.nodes {
		if o.heard[n.id] == alive && n.w.reaches(n.id, o.id) {
			o.heard[n.id] = left
		}
	}
}

// handOn is what an agent does that is told to stop.
func (n *node) handOn() {
	exit := n.exit
	n.in(time.Second, func() { exit("the last words took too long") })
	var r egress.Agent
	n.ask(time.Second, func(e *etcd) { r = e.agents[n.name] }, func(ok bool) {
		if !ok {
			exit("no last words")
			return
		}
		next := Extended{Sent: n.clock(), TTL: n.grace}
		n.ask(time.Second, func(e *etcd) { next.Lease = e.grant(n.grace) }, func(ok bool) {
			if !ok {
				exit("no last words")
				return
			}
			from := n.m.Lease().ID
			r.Node, r.Restarting, r.Revocable, r.Suspectable = n.name, true, false, false
			keep := func(ip netip.Addr) bool {
				keep := n.m.Keeps(n.clock(), ip)
				if keep {
					next.IPs = append(next.IPs, ip)
				}
				return keep
			}
			extended := false
			giveBack := func(why string) {
				n.narrow(func(netip.Addr) (send, answer bool) { return false, false }, func(err error) {
					if err != nil {
						exit(why)
						return
					}
					n.ask(time.Second, func(e *etcd) { e.revoke(next.Lease) }, func(bool) { exit(why) })
				})
			}
			extend := func(rest func()) {
				n.do(func(free func()) {
					n.step(next)
					if len(next.IPs) > 0 && len(n.m.Permits()) == 0 {
						free()
						giveBack("its permits had ended")
						return
					}
					n.kernel.exact = false
					n.write(func(err error) {
						free()
						if err != nil {
							giveBack("its permits are not lengthened")
							return
						}
						extended = true
						rest()
					})
				})
			}
			n.moveTo(from, next.Lease, r, keep, extend, func(ok bool) {
				switch {
				case !ok && !extended:
					giveBack("locks not moved")
				case !ok:
					exit("stopped; locks that came meanwhile not moved")
				default:
					exit("stopped")
				}
			})
		})
	})
}
