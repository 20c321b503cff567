package agent

import (
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
	t := turn{Snapshot: s, lease: a.currentLease(), now: time.Now()}
	// First, and by the snapshot alone: an IP that is not this node's any more is not answered for, whatever else fails below.
	if err := a.permits.restrict(func(ip netip.Addr) (send, answer bool) {
		held := a.holds(t, s.Owners[ip])
		return held || s.Moves[ip].To == a.Node || t.now.Before(a.linger[ip]), held
	}); err != nil {
		return time.Time{}, err
	}
	if plan.Gone(s, a.Node) {
		// The rest of the kernel stays as it is: pods that are there still leave with no other address, and no other node lets them.
		return time.Time{}, errors.Join(in("node", errGone), a.letGo(ctx, t))
	}
	if t.facts, err = a.facts(s); err != nil {
		err = in("uplink", err)
		if errors.Is(err, routing.ErrNoLink) {
			err = errors.Join(err, a.letGo(ctx, t))
		}
		return time.Time{}, err
	}
	if a.gossip != nil {
		a.meet(t)
	}
	var again time.Time
	t.facts.Taken, again = a.probes.follow(s, t.now)
	a.metrics.arrivals(&t, a.Node, func(node string) bool { return a.gossip != nil && a.isDead(node) })
	next = earlier(a.roles(&t), again)
	d := plan.Build(s, t.facts, t.roles)
	a.view.Follow(d.Follow)
	fenced, err := a.program(ctx, d, t.lease)
	if fenced {
		a.ports.follow(d.Blocks)
	}
	a.metrics.programmed(fenced && err == nil, time.Now())
	due, err2 := a.transact(ctx, t, d, fenced, err)
	return earlier(next, due), errors.Join(err, err2, in("pods", unknown(d.Unknown)))
}

// unknown says that no further pod gets its egress IP, since the addresses of the pods of these nodes are not known.
func unknown(nodes []string) error {
	if len(nodes) == 0 {
		return nil
	}
	return fmt.Errorf("no further pod gets its egress IP: the addresses of pods on %s (%d nodes) are not known: it has no spec.podCIDRs, and no "+
		"record of crdsync: upgrade crdsync, or set --cluster-cidrs", nodes[0], len(nodes))
}

// holds reports whether a lock is this agent's.
func (a *agent) holds(t turn, o egress.Owner) bool {
	return o.Node == a.Node && o.Lease == t.lease.ID()
}

// errGone says that the agent serves nothing: its node is none of the cluster's.
var errGone = errors.New("the node has no record in etcd, and serves no egress IP: its Node object is gone, or crdsync has not written " +
	"the record yet")

// letGo falls silent and gives every lock back: this node has lost the address that its overlay is made of, or is gone, and can serve none.
func (a *agent) letGo(ctx context.Context, t turn) error {
	a.announcer.Set(nil)
	a.announced = nil
	if err := a.permits.withdraw(nil); err != nil {
		return err // not silent yet: the locks stay
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	var errs []error
	for _, o := range t.Owners {
		if a.holds(t, o) {
			errs = append(errs, a.release(ctx, o))
		}
	}
	return errors.Join(errs...)
}

// release gives a lock back. An IP that this node has not used yet may be another's still, for which whoever is next has to wait.
func (a *agent) release(ctx context.Context, o egress.Owner) error {
	release := a.Store.ReleaseUnused
	if a.inUse[lock{o.IP, o.Revision}] {
		release = a.Store.Release
	}
	ok, err := release(ctx, o)
	if ok {
		a.metrics.add(metricReleases, 1, string(egress.ReasonRelease))
		a.Log.Info("released", "egress_ip", o.IP)
	}
	return err
}

// turn is what one pass works from.
type turn struct {
	*egress.Snapshot
	facts plan.Facts
	lease *store.Lease // one for the whole pass: another one means other locks
	now   time.Time
	roles map[netip.Addr]plan.Role // what this node may do for each egress IP
}

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
		AnswersARP: slices.Contains(a.features, check.ARPAnswers), Hold: a.HoldUnknown, Local: local, Except: a.Except, Cluster: a.Cluster,
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

// roles sets what this node may do for each egress IP, and returns when that changes by time alone.
func (a *agent) roles(t *turn) (next time.Time) {
	t.roles = map[netip.Addr]plan.Role{}
	seen, inUse := map[lock]time.Time{}, map[lock]bool{}
	for ip, o := range t.Owners {
		if !a.holds(*t, o) {
			continue
		}
		k := lock{ip, o.Revision}
		if seen[k] = a.seen[k]; seen[k].IsZero() {
			seen[k] = t.now
			if o.From != "" || a.adopted[ip] {
				// The former owner fell silent before it wrote the record, or the kernel of this node was in service all along.
				seen[k] = t.now.Add(-a.Permit)
			}
		}
		usable := seen[k].Add(a.Permit)
		if a.freeze != nil && o.From == "" && !a.adopted[ip] {
			usable = later(usable, a.freeze.bound())
		}
		if !a.inUse[k] && t.now.Before(usable) {
			t.roles[ip] = plan.Pending
			next = earlier(next, usable)
			continue
		}
		if !a.inUse[k] { // else the snapshot may be older than the hand-over
			a.returns(ip)
			a.metrics.takes(o)
		}
		t.roles[ip], inUse[k] = plan.Hold, true
	}
	a.seen, a.inUse, a.adopted = seen, inUse, nil
	for _, ip := range a.probes.asking(t.now) {
		if t.roles[ip] == plan.None {
			t.roles[ip] = plan.Ask
		}
	}
	for _, o := range plan.Releases(t.Snapshot, t.facts) {
		delete(t.roles, o.IP) // silent first: the lock goes only when the kernel is done
	}
	for _, m := range plan.Arrivals(t.Snapshot, t.facts) {
		a.returns(m.IP)
		t.roles[m.IP] = plan.Arrive
	}
	for _, d := range plan.Departures(t.Snapshot, t.facts) {
		if t.roles[d.Owner.IP] == plan.Hold {
			t.roles[d.Owner.IP] = plan.Relay
		}
	}
	for ip, until := range a.linger {
		if !t.now.Before(until) {
			delete(a.linger, ip)
		} else if t.roles[ip] == plan.None {
			t.roles[ip] = plan.Relay
			next = earlier(next, until)
		}
	}
	return next
}

// returns ends the relaying for the next owner of an IP that comes back: what is left of its last time here has to go.
func (a *agent) returns(ip netip.Addr) {
	if _, lingers := a.linger[ip]; lingers {
		delete(a.linger, ip)
		a.flusher.returns(ip)
	}
}

// program makes the kernel equal to d, as far as it lets itself. fenced reports whether the tables hold what d asks; without that, nothing
// is permitted. The order keeps two promises at every moment: an address is on a link, or local by a route, only while its fence stands, and
// nothing points at what is not there yet. So: permits that end, addresses that go, and what makes them local; routes that come; the tables,
// in one transaction; addresses that come, and what makes them local, routes that go; and last the permits. What fails holds up nothing else.
func (a *agent) program(ctx context.Context, d plan.Desired, lease *store.Lease) (fenced bool, err error) {
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
	d.NFT.Fenced = slices.Concat(d.NFT.Fenced, links.Addresses(), routes.Locals())
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
	if err := a.permits.grant(d.Permits, lease); err != nil {
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

// transact does in etcd what the kernel is ready for, and returns when the next claim is due. Without its tables a node
// claims nothing, and releases nothing: it might still be answering. With anything else at fault only moves wait, of the IPs that it is about.
func (a *agent) transact(ctx context.Context, t turn, d plan.Desired, fenced bool, faulty error) (time.Time, error) {
	// Milliseconds are usual. While etcd does not answer, the kernel is looked after all the same.
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	errs := []error{a.publish(ctx, t)}
	if !fenced {
		return time.Time{}, errors.Join(errs...)
	}
	for _, o := range plan.Releases(t.Snapshot, t.facts) {
		if !a.holds(t, o) {
			continue // a former lease of this node
		}
		errs = append(errs, a.release(ctx, o))
	}
	for _, m := range plan.Arrivals(t.Snapshot, t.facts) {
		if !m.ReadyAt(t.Agents[a.Node]) && t.roles[m.IP] == plan.Arrive && !d.NFT.KeepSenders && !hampers(faulty, d, m.IP) {
			_, err := a.Store.Ready(ctx, m, t.lease)
			errs = append(errs, err)
		}
	}
	for _, dep := range plan.Departures(t.Snapshot, t.facts) {
		if t.roles[dep.Owner.IP] != plan.Relay || hampers(faulty, d, dep.Owner.IP) {
			continue
		}
		ok, err := a.Store.HandOver(ctx, dep.Owner, dep.Move, dep.To)
		if errs = append(errs, err); ok || err != nil { // an answer may get lost
			a.linger[dep.Owner.IP] = time.Now().Add(a.Linger)
		}
		if ok {
			a.history.trim(dep.Owner.IP)
			a.metrics.add(metricReleases, 1, string(cmp.Or(dep.Move.Why, egress.ReasonMove)))
			a.Log.Info("handed over", "egress_ip", dep.Owner.IP, "node", dep.To.Node, "why", cmp.Or(dep.Move.Why, egress.ReasonMove))
		}
	}
	if a.freeze != nil {
		if bound := a.freeze.bound(); time.Now().Before(bound) {
			return bound, errors.Join(errs...) // promised
		}
	}
	errs = append(errs, a.endFormer(ctx, t))
	next, err := a.revoke(ctx, t)
	errs = append(errs, err)
	due, err := a.claim(ctx, t)
	errs, next = append(errs, err), earlier(next, due)
	due, err2 := a.giveAway(ctx, t)
	return earlier(next, due), errors.Join(append(errs, err, err2)...)
}

// publish keeps agents/<node> up to date.
func (a *agent) publish(ctx context.Context, t turn) error {
	if a.since.IsZero() {
		a.since = time.Now().UTC().Truncate(time.Second)
	}
	r := egress.Agent{
		Node: a.Node, Address: t.facts.Underlay, MAC: egress.OverlayMAC(t.facts.Underlay).String(), Lease: store.FormatLease(t.lease.ID()),
		Version: a.Version, Features: a.features, Since: a.since, Refused: plan.Refused(t.Snapshot, t.facts),
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
	r.Revocable = a.gossip != nil && a.permits.revocable()
	if have.Lease == r.Lease && have.Address == r.Address && have.Version == r.Version && slices.Equal(have.Features, r.Features) && have.Since.Equal(r.Since) &&
		maps.Equal(have.Conflicts, r.Conflicts) && maps.Equal(have.Dropped, r.Dropped) && maps.Equal(have.Refused, r.Refused) && samePorts(have.Ports, r.Ports) && have.Revocable == r.Revocable && have.Restarting == r.Restarting {
		return nil
	}
	return a.Store.PutAgent(ctx, t.lease, r)
}

// claim tries for the egress IPs whose time has come: the first in rank at once, each next one a step later.
func (a *agent) claim(ctx context.Context, t turn) (next time.Time, err error) {
	unowned, former, claimed := map[netip.Addr]time.Time{}, map[netip.Addr]string{}, map[netip.Addr]bool{}
	for ip, o := range t.Owners {
		former[ip] = o.Node
	}
	var errs []error
	s, lag := t.Snapshot, 0
	if a.gossip != nil {
		living := *s
		living.Agents = plan.Living(s, a.Node, a.isDead)
		if s = &living; len(living.Agents) == 0 {
			s, lag = t.Snapshot, 1 // cut off from its peers: they go first
		}
	}
	for _, c := range plan.Claims(s, t.facts) {
		if unowned[c.IP] = a.unowned[c.IP]; unowned[c.IP].IsZero() {
			unowned[c.IP] = t.now
		}
		former[c.IP] = a.former[c.IP]
		if due := unowned[c.IP].Add(time.Duration(c.Rank+lag) * a.ClaimDelay); t.now.Before(due) {
			next = earlier(next, due)
			continue
		}
		if c.Why != egress.ReasonStatic && !a.probes.clear(c, t.now) {
			continue
		}
		ok, err := a.Store.Claim(ctx, t.lease, egress.Owner{IP: c.IP, Node: a.Node, Since: time.Now().UTC().Truncate(time.Millisecond), Why: c.Why,
			From: former[c.IP]})
		if err != nil {
			errs = append(errs, err)
		}
		if claimed[c.IP] = ok; ok && !a.claimed[c.IP] { // else the view has not seen it yet
			a.history.trim(c.IP)
			a.Log.Info("claimed", "egress_ip", c.IP, "why", c.Why)
		}
	}
	a.unowned, a.former, a.claimed = unowned, former, claimed
	return next, errors.Join(errs...)
}

// letGoTime is how long the agent of a node that is gone has to let go by itself: it takes milliseconds, and a second and a half where its
// watch hangs.
const letGoTime = 2 * time.Second

// acquaintance is how long a lease must have been seen before its agent counts as dead: a new one may not have joined the gossip yet.
const acquaintance = 2 * time.Second

// meet tells the gossip of the other agents, and notes since when their leases are seen, and who is missed.
func (a *agent) meet(t turn) {
	peers, met := map[string]netip.Addr{}, map[string]time.Time{}
	for name, r := range t.Agents {
		if name == a.Node {
			continue
		}
		peers[name] = r.Address
		if met[r.Lease] = a.met[r.Lease]; met[r.Lease].IsZero() {
			met[r.Lease] = t.now
		}
	}
	a.met = met
	a.missed = plan.Missed(t.Snapshot, a.Node, a.isDead, a.missed)
	a.gossip.Set(t.facts.Underlay, peers)
}

func (a *agent) isDead(node string) bool {
	return a.gossip.State(node) == gossip.Dead || a.freeze.astray(node)
}

// revoke ends the leases of dead agents, and of those that go on with IPs although their node is gone, which frees the IPs: the first in rank at
// once, each next one a step later. While etcd is full nobody could claim them, nor the agent, should it live, get another lease.
func (a *agent) revoke(ctx context.Context, t turn) (next time.Time, err error) {
	if a.gossip == nil {
		return time.Time{}, nil
	}
	dead := map[string]time.Time{}
	var errs []error
	for _, r := range plan.Revocations(t.Snapshot, a.Node, a.isDead) {
		if a.missed[r.Agent.Node] {
			continue
		}
		lease := r.Agent.Lease
		if dead[lease] = a.dead[lease]; dead[lease].IsZero() {
			dead[lease] = t.now
		}
		due := later(dead[lease].Add(time.Duration(r.Rank)*a.ClaimDelay), a.met[lease].Add(acquaintance))
		if r.Alive {
			due = due.Add(letGoTime)
		}
		if t.now.Before(due) {
			next = earlier(next, due)
			continue
		}
		if a.Store.AskNoSpace(ctx) {
			next = earlier(next, t.now.Add(time.Second))
			continue
		}
		id, err := store.ParseLease(lease)
		if err == nil {
			err = a.Store.Revoke(ctx, id)
		}
		if errs = append(errs, err); err == nil {
			a.metrics.add(metricRevoked, 1)
			a.Log.Warn("lease of an agent that is dead or whose node is gone revoked", "node", r.Agent.Node, "lease", lease)
		}
	}
	a.dead = dead
	return next, errors.Join(errs...)
}

// endFormer ends the leases of this node's former life that locks are still under, as after a restore of etcd. A node has one agent, and that
// one is silent about those IPs: nobody has to wait for the end of such a lease.
func (a *agent) endFormer(ctx context.Context, t turn) error {
	ended := map[int64]error{}
	for ip, o := range t.Owners {
		if o.Node != a.Node || a.holds(t, o) {
			continue
		}
		if _, done := ended[o.Lease]; !done {
			ended[o.Lease] = a.Store.Revoke(ctx, o.Lease)
			a.Log.Warn("former lease revoked", "lease", store.FormatLease(o.Lease), "egress_ip", ip, "err", ended[o.Lease])
		}
	}
	return errors.Join(slices.Collect(maps.Values(ended))...)
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

// later returns the later of two times.
func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}
