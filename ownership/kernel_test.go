package ownership

import (
	"fmt"
	"maps"
	"net/netip"
	"time"
)

// kernel holds the permits. They end together, by its clock.
type kernel struct {
	n     *node
	list  map[netip.Addr]bool // IP -> answers
	until time.Duration
	exact bool // list is what the agent of now has written: a renewal needs no commit
	queue []func(done func())
	used  bool
}

func (k *kernel) answers(ip netip.Addr) bool {
	return k.list[ip] && k.n.w.now < k.until && k.n.w.now >= k.n.paused
}

// do runs an operation that has the kernel to itself; it calls done in the end.
func (n *node) do(op func(done func())) {
	k := &n.kernel
	k.queue = append(k.queue, op)
	n.next()
}

func (n *node) next() {
	k := &n.kernel
	if k.used || len(k.queue) == 0 {
		return
	}
	op := k.queue[0]
	k.queue = k.queue[1:]
	k.used = true
	life := n.life
	op(func() {
		if n.life == life {
			k.used = false
			n.next()
		}
	})
}

// write writes the permits, by a frame where the kernel has exactly those, else by a commit.
func (n *node) write(done func(error)) {
	list := n.m.Permits()
	w, k, life := n.w, &n.kernel, n.life
	if len(list) == 0 && k.exact {
		done(nil)
		return
	}
	now := n.clock()
	end, limit, err := n.m.Look(now)
	if len(list) == 0 {
		end, limit, err = now, time.Time{}, nil
	}
	if err != nil {
		done(err)
		return
	}
	d := end.Sub(now)
	if k.exact && !w.chance(10) {
		// A frame works within a twentieth of P, or never.
		if length := d / (n.permit / 16) * (n.permit / 16); n.m.permits.bounded {
			d = length
		}
		n.after(w.between(0, n.span(n.permit/20)), func() {
			if n.life == life && k.exact && d > 0 {
				k.until = w.now + n.span(d)
				w.say("%s: kernel renewed its permits for %v", n.name, d.Round(time.Millisecond))
				for ip := range k.list {
					w.check(n, ip)
				}
			}
		})
		n.in(n.permit/20, func() {
			n.m.Written(now.Add(d), limit)
			done(nil)
		})
		return
	}
	if w.now < n.broken {
		n.in(time.Millisecond, func() { done(errKernel) })
		return
	}
	k.exact = false
	w.trigger(n, atKernel)
	n.after(w.between(0, n.span(n.permit/25)), func() {
		if n.life != life && w.chance(2) {
			return // killed before
		}
		if n.off {
			return
		}
		k.list = map[netip.Addr]bool{}
		for _, p := range list {
			k.list[p.IP] = p.Answer
		}
		k.until = w.now + n.span(d)
		w.say("%s: kernel has permits %s for %v", n.name, permitNames(list), d.Round(time.Millisecond))
		for ip := range k.list {
			w.check(n, ip)
		}
		if n.life == life {
			k.exact = true
		}
	})
	n.in(n.permit/25, func() {
		n.m.Written(end, limit)
		done(nil)
	})
}

var (
	errKernel   = fmt.Errorf("the kernel did not take it")
	errNoAnswer = fmt.Errorf("etcd has not answered")
)

func permitNames(list []Permit) (out []string) {
	for _, p := range list {
		if p.Answer {
			out = append(out, p.IP.String())
		} else {
			out = append(out, p.IP.String()+"(sends)")
		}
	}
	return out
}

// renewSoon renews the permits once for all who ask meanwhile.
func (n *node) renewSoon() {
	if !n.renewalDue {
		n.renewalDue = true
		n.do(func(free func()) {
			n.renewalDue = false
			if n.m.permits.last {
				free()
				return
			}
			n.write(func(error) { free() })
		})
	}
}

// narrow ends what may does not allow.
func (n *node) narrow(may func(netip.Addr) (bool, bool), done func(error)) {
	n.do(func(free func()) {
		gone, silent := n.m.Narrow(may)
		n.revoke(gone, silent, func(err error) {
			if err == nil {
				n.m.Acknowledged()
			}
			free()
			done(err)
		})
	})
}

// revoke ends permits in the kernel.
func (n *node) revoke(gone, silent []netip.Addr, done func(error)) {
	if len(gone)+len(silent) == 0 {
		done(nil)
		return
	}
	if n.w.now < n.broken {
		n.kernel.exact = false // the next write is a commit
		n.in(time.Millisecond, func() { done(errKernel) })
		return
	}
	life := n.life
	n.w.trigger(n, atKernel)
	n.after(n.w.between(0, 2*time.Millisecond), func() {
		if n.life != life && n.w.chance(2) {
			return
		}
		for _, ip := range gone {
			delete(n.kernel.list, ip)
		}
		for _, ip := range silent {
			if _, ok := n.kernel.list[ip]; ok {
				n.kernel.list[ip] = false
			}
		}
		n.w.say("%s: kernel is silent about %v, only sends with %v", n.name, gone, silent)
	})
	n.in(2*time.Millisecond, func() { done(nil) })
}

func (k *kernel) same(list []Permit) bool {
	want := map[netip.Addr]bool{}
	for _, p := range list {
		want[p.IP] = p.Answer
	}
	return maps.Equal(want, k.list)
}
