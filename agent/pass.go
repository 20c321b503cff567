package agent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/check"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/gossip"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/store"
	"github.com/egret-project/egret/vlan"
)

// pass brings kernel and etcd one step closer to what the snapshot asks for, and returns when the next pass is due by time alone (zero:
// never). It can be repeated at will.
func (a *agent) pass(ctx context.Context) (next time.Time, err error) {
	s := a.view.Snapshot()
	if s == nil {
		return time.Time{}, nil
	}
	a.skipped(s)
	a.cluster = a.cluster.With(s)
	t := turn{Cluster: a.cluster}
	t.lease, t.now = a.machine.begin(t.Cluster)
	// First, and by the snapshot alone: an IP that is not this node's any more is not answered for, whatever else fails below.
	if err := a.permits.restrict(); err != nil {
		return time.Time{}, err
	}
	if plan.Gone(s, a.Node) {
		// The rest of the kernel stays as it is: pods that are there still leave with no other address, and no other node lets them.
		return time.Time{}, errors.Join(in("node", errGone), a.letGo(ctx))
	}
	if t.facts, err = a.facts(s); err != nil {
		err = in("uplink", err)
		if errors.Is(err, routing.ErrNoLink) {
			err = errors.Join(err, a.letGo(ctx))
		}
		return time.Time{}, err
	}
	dead := a.meet(t)
	t.facts.Taken, next = a.probes.follow(s, t.now)
	a.metrics.arrivals(&t, a.Node, func(node string) bool { return dead(node) || a.machine.Partitioned(t.now, node) })
	a.roles(&t, dead)
	d := plan.Build(t.Cluster, t.facts, t.roles)
	a.view.Follow(d.Follow)
	fenced, err := a.program(ctx, d)
	if fenced {
		a.ports.follow(d.Blocks)
	}
	a.metrics.programmed(fenced && err == nil, time.Now())
	due, err2 := a.transact(ctx, t, d, fenced, err)
	return earlier(earlier(next, due), a.machine.Next()), errors.Join(err, err2, in("pods", unknown(d.Unknown)))
}

// unknown says that no further pod gets its egress IP, since the addresses of the pods of these nodes are not known.
func unknown(nodes []string) error {
	if len(nodes) == 0 {
		return nil
	}
	return fmt.Errorf("no further pod gets its egress IP: the addresses of pods on %s (%d nodes) are not known: it has no spec.podCIDRs, and no "+
		"record of crdsync: upgrade crdsync, or set --cluster-cidrs", nodes[0], len(nodes))
}

// errGone says that the agent serves nothing: its node is none of the cluster's.
var errGone = errors.New("the node has no record in etcd, and serves no egress IP: its Node object is gone, or crdsync has not written " +
	"the record yet")

// letGo falls silent and gives every lock back: this node has lost the address that its overlay is made of, or is gone, and can serve none.
func (a *agent) letGo(ctx context.Context) error {
	a.announcer.Set(nil)
	a.announced = nil
	if err := a.permits.withdraw(nil); err != nil {
		return err // not silent yet: the locks stay
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var errs []error
	for _, effect := range a.machine.step(ownership.Unable{}) {
		errs = append(errs, a.release(ctx, effect.(ownership.Release)))
	}
	return errors.Join(errs...)
}

// release gives a lock back. An IP that this node has not used yet may be another's still, for which whoever is next has to wait.
func (a *agent) release(ctx context.Context, r ownership.Release) error {
	release := a.Store.Release
	if r.Unused {
		release = a.Store.ReleaseUnused
	}
	ok, err := release(ctx, r.Owner)
	if ok {
		a.metrics.add(metricReleases, 1, string(egress.ReasonRelease))
		a.Log.Info("released", "egress_ip", r.Owner.IP)
	}
	return err
}

// turn is what one pass works from.
type turn struct {
	*plan.Cluster
	facts plan.Facts
	lease *store.Lease // one for the whole pass: another one means other locks
	now   time.Time
	roles map[netip.Addr]plan.Role // what this node may do for each egress IP
}

// holds reports whether a lock is this agent's.
func (t turn) holds(o egress.Owner) bool { return o.Node == t.facts.Node && o.Lease == t.lease.ID() }

// facts reads what the node knows of itself.
func (a *agent) facts(s *egress.Snapshot) (plan.Facts, error) {
	ip := a.NodeIP
	if !ip.IsValid() {
		n := s.Nodes[a.Node]
		if len(n.Addresses) == 0 {
			return plan.Facts{}, fmt.Errorf("node %s has no address in etcd yet: crdsync writes it, or set --node-ip", a.Node)
		}
		ip = n.Addresses[0]
	}
	links, err := routing.ReadLinks()
	if err != nil {
		return plan.Facts{}, err
	}
	uplink, err := links.Uplink(ip)
	if err != nil {
		return plan.Facts{}, fmt.Errorf("finding the uplink: %w (--node-ip names another address)", err)
	}
	local := map[netip.Addr]bool{}
	for addr, name := range links.Addresses() {
		if name != egress.AddressLink && !strings.HasPrefix(name, "egret.") {
			local[addr] = true
		}
	}
	f := plan.Facts{
		Node: a.Node, Underlay: ip, Uplink: linkOf(uplink), PoolUplink: a.Uplink, NoVLAN: !slices.Contains(a.features, check.VLAN),
		AnswersARP: slices.Contains(a.features, check.ARPAnswers), FirstPacketDelay: a.HoldUnknown, Local: local, Except: a.Except, Cluster: a.Cluster,
		RandomPorts: a.RandomPorts,
	}
	for _, l := range links.Others() {
		f.Links = append(f.Links, linkOf(l))
	}
	return f, nil
}

func linkOf(l routing.Link) plan.Link {
	out := plan.Link{Name: l.Name, MTU: l.MTU, Up: l.Up, IPv6: l.HasIPv6(), Prefixes: l.Addrs, VLAN: l.VLAN, Parent: l.Parent}
	if len(l.MAC) == len(out.MAC) { // else it is not Ethernet's
		out.MAC = [6]byte(l.MAC)
	}
	return out
}

// roles sets what this node may do for each egress IP.
func (a *agent) roles(t *turn, dead func(node string) bool) {
	for _, effect := range a.machine.step(ownership.Facts{Facts: t.facts, Dead: dead, Asking: a.probes.asking(t.now)}) {
		switch f := effect.(type) {
		case ownership.Program:
			t.roles = f.Roles
		case ownership.Used:
			a.metrics.takes(f.Owner)
		case ownership.Returned:
			a.flusher.returns(f.IP)
		}
	}
}

// program makes the kernel equal to d, as far as it lets itself. fenced reports whether the tables hold what d asks; without that, nothing
// is permitted. The order keeps two promises at every moment: an address is on a link, or local by a route, only while its fence stands, and
// nothing points at what is not there yet. So: permits that end, addresses that go, and what makes them local; routes that come; the tables,
// in one transaction; addresses that come, and what makes them local, routes that go; and last the permits. What fails holds up nothing else.
func (a *agent) program(ctx context.Context, d plan.Desired) (fenced bool, err error) {
	a.announcer.Set(both(a.announced, d.Announce))
	if err := a.permits.withdraw(d.Permits); err != nil {
		return false, in("permits", err)
	}
	links, err := a.links.Observe()
	if err != nil {
		return false, in("addresses", err)
	}
	// Routes lead to them.
	vlans := vlan.Diff(links, d.VLAN).Links()
	made := in("VLAN links", a.links.Apply(vlans))
	routes, err := a.router.Observe()
	if err != nil {
		return false, in("routes", err)
	}
	tables, err := a.tables.Observe()
	if err != nil {
		return false, in("nftables", err)
	}
	addrs, moves := vlan.Diff(links, d.VLAN), routing.Diff(routes, d.Routing)
	errs := []error{made, in("addresses", a.links.Apply(addrs.Removes())), in("routes", a.router.Apply(moves.NoLocals()))}
	if !addrs.Removes().Empty() {
		if links, err = a.links.Observe(); err != nil {
			return false, in("addresses", err)
		}
	}
	if !moves.NoLocals().Empty() {
		if routes, err = a.router.Observe(); err != nil {
			return false, in("routes", err)
		}
	}
	// The fence follows the address: it goes when the address was seen to be gone, and what makes it local.
	d.NFT.AddressGuard = slices.Concat(d.NFT.AddressGuard, links.Addresses(), routes.Locals())
	d.NFT.Renewal = a.permits.renewal
	rules := nft.Diff(tables, d.NFT)

	arrive := func(part routing.Changes) { errs = append(errs, in("routes", a.router.Apply(part))) }
	// Where the tables are not whole, as after a boot, they come before the overlay is up: what it brings would pass without them, and leave
	// with this node's own address.
	whole := len(rules.Repairs) == 0
	if arrive(moves.Links()); whole {
		arrive(moves.Entries())
	}
	if err := a.tables.Apply(rules); err != nil {
		// Without its fence no address may come, and without the new tables no route may go.
		return false, errors.Join(append(errs, in("nftables", err))...)
	}
	if !whole {
		arrive(moves.Entries())
	}
	a.log(ctx, "addresses", addrs)
	a.log(ctx, "routes", moves)
	a.log(ctx, "nftables", rules)
	a.countResets(moves.Loosened, d)
	errs = append(errs,
		in("conntrack", a.flusher.follow(rules, d)),
		in("addresses", a.links.Apply(addrs.Adds())), in("routes", a.router.Apply(moves.Locals())), in("routes", a.router.Apply(moves.Removes())))
	if err := a.permits.grant(d.Permits); err != nil {
		return true, errors.Join(append(errs, in("permits", fmt.Errorf("renewing permits: %w", err)))...)
	}
	a.announced = d.Announce
	a.announcer.Set(d.Announce)
	return true, errors.Join(errs...)
}

// countResets counts how often somebody else set rp_filter of a VLAN link, and says so.
func (a *agent) countResets(loosened []string, d plan.Desired) {
	for _, link := range loosened {
		n, known := a.resets[link]
		if a.resets[link] = 0; known { // else the link is new
			a.resets[link] = n + 1
			a.metrics.add(metricResets, 1, link)
			a.Log.Warn("rp_filter was reset, and is loose again", "link", link, "times", n+1)
		}
	}
	for link := range a.resets {
		if !slices.ContainsFunc(d.Routing.Subnets, func(s routing.Subnet) bool { return s.Link == link }) {
			delete(a.resets, link)
		}
	}
}

// log says and counts what changed in a part of the kernel: one line a change, and a steady state is silent. The lines of the ruleset itself,
// which is the same on every node, are for debugging.
func (a *agent) log(ctx context.Context, part string, changes fmt.Stringer) {
	n := 0
	for line := range strings.Lines(changes.String()) {
		n++
		level := slog.LevelInfo
		if _, nft := changes.(nft.Changes); nft && !strings.Contains(line, " element ") {
			level = slog.LevelDebug
		}
		a.Log.Log(ctx, level, "kernel changed", "change", strings.TrimRight(line, "\n"))
	}
	a.metrics.changes(part, n)
}

// transact does in etcd what the kernel is ready for and the machine decides, and returns when there is more to do. Without its tables a node
// claims nothing, and releases nothing: it might still be answering. With anything else at fault only moves wait, of the IPs that it is about.
func (a *agent) transact(ctx context.Context, t turn, d plan.Desired, fenced bool, faulty error) (next time.Time, err error) {
	// Milliseconds are usual. While etcd does not answer, the kernel is looked after all the same.
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var errs []error
	for _, effect := range a.machine.step(ownership.Programmed{Fenced: fenced}) {
		switch f := effect.(type) {
		case ownership.Publish:
			errs = append(errs, a.publish(ctx, t, f.Revocable))
		case ownership.Longest:
			errs = append(errs, a.longest(ctx, t, f))
		case ownership.Release:
			errs = append(errs, a.release(ctx, f))
		case ownership.Ready:
			if !d.NFT.KeepSenders && !hampers(faulty, d, f.Move.IP) {
				_, err := a.Store.Ready(ctx, f.Move, t.lease)
				errs = append(errs, err)
			}
		case ownership.HandOver:
			if !hampers(faulty, d, f.Owner.IP) {
				errs = append(errs, a.handOver(ctx, f))
			}
		}
	}
	if fenced {
		claimed := map[netip.Addr]bool{}
		for _, effect := range a.machine.step(ownership.Settled{}) {
			switch f := effect.(type) {
			case ownership.Longest:
				errs = append(errs, a.longest(ctx, t, f))
			case ownership.Suspect:
				errs = append(errs, a.suspect(ctx, f))
			case ownership.Revoke:
				due, err := a.revoke(ctx, f)
				next, errs = earlier(next, due), append(errs, err)
			case ownership.Claim:
				ok, err := a.claim(ctx, t, f)
				claimed[f.IP], errs = ok, append(errs, err)
			}
		}
		a.claimed = claimed
		if !a.machine.Promised(time.Now()) {
			due, err := a.giveAway(ctx, t)
			next, errs = earlier(next, due), append(errs, err)
		}
	}
	if err = errors.Join(errs...); errors.Is(err, store.ErrLeaseLost) {
		err = errors.Join(err, a.tell(ownership.Lost{Lease: t.lease.ID()}))
	}
	return next, err
}

// longest says in etcd for how long a claimer has to wait.
func (a *agent) longest(ctx context.Context, t turn, l ownership.Longest) error {
	put := a.Store.LowerPermit
	if l.Raise {
		put = a.Store.RaisePermit
	}
	ok, err := put(ctx, l.Permit, t.Revision)
	if ok {
		a.Log.Info("longest permit changed", "was", t.Longest, "dur", l.Permit)
	}
	return err
}

// handOver gives a lock to the target of a move.
func (a *agent) handOver(ctx context.Context, h ownership.HandOver) error {
	ok, err := a.Store.HandOver(ctx, h.Owner, h.Move, h.To)
	a.machine.step(ownership.HandedOver{IP: h.Owner.IP, OK: ok, Err: err != nil})
	if ok {
		why := cmp.Or(h.Move.Why, egress.ReasonMove)
		a.history.trim(h.Owner.IP)
		a.metrics.add(metricReleases, 1, string(why))
		a.Log.Info("handed over", "egress_ip", h.Owner.IP, "node", h.To.Node, "why", why)
	}
	return err
}

// publish keeps agents/<node> up to date.
func (a *agent) publish(ctx context.Context, t turn, revocable bool) error {
	if a.since.IsZero() {
		a.since = time.Now().UTC().Truncate(time.Second)
	}
	r := egress.Agent{
		Node: a.Node, Address: t.facts.Underlay, MAC: egress.OverlayMAC(t.facts.Underlay).String(), Lease: egress.FormatLease(t.lease.ID()),
		Version: a.Version, Features: a.features, Since: a.since, Refused: plan.Refused(t.Snapshot, t.facts), Exposed: a.Exposed,
	}
	have := t.Agents[a.Node]
	r.Faults = have.Faults // publishFaults changes them
	conflicts := a.announcer.Conflicts()
	maps.Copy(conflicts, a.probes.conflicts())
	for ip, c := range conflicts {
		if r.Conflicts == nil {
			r.Conflicts = map[netip.Addr]string{}
		}
		r.Conflicts[ip] = c.String()
	}
	r.Dropped, r.Ports = a.drops.why(), a.ports.use()
	r.Revocable, r.Suspectable, r.Permit = revocable, revocable, egress.Duration(a.Permit)
	r.Ready = have.Ready && !have.Restarting || a.ready.check() == nil
	if sameRecord(have, r) {
		return nil
	}
	return a.Store.PutAgent(ctx, t.lease, r)
}

// sameRecord reports whether two records are written alike: to write the second would change nothing.
func sameRecord(a, b egress.Agent) bool {
	x, errX := store.Encode(a)
	y, errY := store.Encode(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

// claim takes a lock that nobody has, once no other host answers for the IP.
func (a *agent) claim(ctx context.Context, t turn, c ownership.Claim) (ok bool, err error) {
	if c.Why != egress.ReasonStatic && !a.probes.clear(c.Claim, t.now) {
		return false, nil
	}
	o := egress.Owner{IP: c.IP, Node: a.Node, Since: time.Now().UTC().Truncate(time.Millisecond), Why: c.Why}
	ok, err = a.Store.Claim(ctx, t.lease, o, store.Former{Revision: c.Seen, Suspicion: c.Suspicion})
	if ok && !a.claimed[c.IP] { // else the view has not seen it yet
		a.history.trim(c.IP)
		a.Log.Info("claimed", "egress_ip", c.IP, "why", c.Why)
	}
	return ok, err
}

// meet tells the gossip of the other agents, and returns who is dead by it.
func (a *agent) meet(t turn) (dead func(node string) bool) {
	gone, peers := map[string]bool{}, map[string]netip.Addr{}
	dead = func(node string) bool { return gone[node] }
	if a.gossip == nil {
		return dead
	}
	for name, r := range t.Agents {
		if name != a.Node {
			peers[name], gone[name] = r.Address, a.gossip.State(name) == gossip.Dead
		}
	}
	a.gossip.Set(t.facts.Underlay, peers, func(yield func(string, netip.Addr) bool) { // in another order each time
		for name, n := range t.Nodes {
			if len(n.Addresses) > 0 && !yield(name, n.Addresses[0]) {
				return
			}
		}
	})
	return dead
}

// suspect writes a suspicion against an agent.
func (a *agent) suspect(ctx context.Context, s ownership.Suspect) error {
	s.Suspicion.Since = time.Now().UTC().Truncate(time.Millisecond)
	ok, err := a.Store.Suspect(ctx, s.Suspicion, s.Seen)
	if ok {
		a.Log.Info("agent suspected", "node", s.Suspicion.Node, "lease", s.Suspicion.Lease)
	}
	return err
}

// revoke ends the lease of an agent. While etcd is full nobody could claim what that frees, nor the agent, should it live, get another lease: then it
// returns when to look again.
func (a *agent) revoke(ctx context.Context, r ownership.Revoke) (next time.Time, err error) {
	if !r.Former && a.Store.AskNoSpace(ctx) {
		return time.Now().Add(time.Second), nil
	}
	if r.Suspicion.Revision > 0 {
		if stands, err := a.Store.Suspected(ctx, r.Suspicion); err != nil || !stands {
			return next, err
		}
	}
	if err := a.Store.Revoke(ctx, r.Lease); err != nil {
		return next, err
	}
	what := "lease of an agent that is dead or whose node is gone revoked"
	if r.Former {
		what = "former lease revoked"
	} else {
		a.metrics.add(metricRevoked, 1)
	}
	a.Log.Warn(what, "node", r.Node, "lease", egress.FormatLease(r.Lease))
	return next, nil
}

// skipped logs the records that could not be read, when they change: they are served as they last were, the others as they are.
func (a *agent) skipped(s *egress.Snapshot) {
	var errs []error
	for _, f := range s.Faults {
		errs = append(errs, fmt.Errorf("%s: %w", f.Key, f.Err))
	}
	err := errors.Join(errs...)
	if text := fmt.Sprint(err); text != a.lastSkipped && (err != nil || a.lastSkipped != "") {
		a.lastSkipped = text
		a.Log.Error("records skipped", "err", err)
	}
}

// both returns the entries that a and b agree on.
func both(a, b map[netip.Addr]string) map[netip.Addr]string {
	out := map[netip.Addr]string{}
	for ip, link := range a {
		if b[ip] == link {
			out[ip] = link
		}
	}
	return out
}

// earlier returns the earlier of two times; the zero time is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
