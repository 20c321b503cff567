package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/announce"
	"github.com/egret-project/egret/fastpath"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/routing"
	"github.com/egret-project/egret/vlan"
)

// kernel is what the agent programs.
type kernel struct {
	handles
	announcer  *announce.Announcer
	permits    *permits
	flusher    *flusher
	log        *slog.Logger
	metrics    *metrics
	programmed programmed
	kernelState
}

// handles are what the parts of the kernel are read and written by.
type handles struct {
	tables *nft.Tables
	router *routing.Router
	links  *vlan.Links
	fast   *fastpath.Path // nil: off
}

// kernelState is what the goroutine of loop, to which it belongs, knows of the kernel from one reconcile to the next.
type kernelState struct {
	read      reading
	differ    nft.Differ
	fastOff   string                // why the fast path was not used; "": it was
	announced map[netip.Addr]string // as of the last program that was complete
	resets    map[string]int        // how often somebody reset rp_filter of a link
}

// openKernel returns the kernel of the calling thread's network namespace. It changes nothing in it.
func openKernel(cfg Config, m *machine, counts *metrics, wake func()) (k *kernel, err error) {
	k = &kernel{flusher: newFlusher(wake), log: cfg.Log, metrics: counts, kernelState: kernelState{resets: map[string]int{}}}
	if k.tables, err = nft.New(nft.Config{Log: cfg.Log, Shared: cfg.ShareTables}); err != nil {
		return nil, err
	}
	if k.router, err = routing.New(routing.Config{Log: cfg.Log}); err != nil {
		return nil, err
	}
	if k.links, err = vlan.New(vlan.Config{Log: cfg.Log, Sysctl: cfg.Sysctl}); err != nil {
		return nil, err
	}
	k.permits = newPermits(k.tables, m, cfg.Permit, cfg.LeaseTTL)
	k.permits.metrics = counts
	if cfg.FastPath {
		if k.fast, err = fastpath.New(); err != nil {
			return nil, err
		}
		k.permits.fast = k.fast
	}
	k.announcer = announce.New(announce.Config{Log: cfg.Log, Permitted: m.answers, Changed: wake})
	return k, nil
}

// program makes the kernel equal to what was planned, as far as it lets itself. applied reports whether the tables hold
// what is asked; without that, nothing is permitted. The order keeps two promises at every moment: an address is on a
// link, or local by a route, only while the tables guard it, and nothing points at what is not there yet. So: permits
// that end, addresses that go, and what makes them local; routes that come; what the fast path loses; the tables, in one
// transaction; the permits; addresses that come, and what makes them local, routes that go; and last what the fast path
// gets. Permits come before the addresses, because the kernel may ask for a next hop in the name of an address that it
// has: the tables let that out by a permit alone, and it asks again a second later. What fails holds up nothing else.
func (k *kernel) program(ctx context.Context, planned plan.Desired) (applied bool, err error) {
	written := k.programmed.begin()
	made, have, err := k.prepare(planned)
	if err != nil {
		written(&planned)
		return false, err
	}
	d := planned.Keeping(have.tables.Pods())
	defer written(&d) // also after a fault: what the kernel lacks is then what differs
	return k.write(ctx, d, have, made)
}

// observed is the kernel as it was read.
type observed struct {
	links  vlan.Observed
	routes routing.Observed
	tables nft.Observed
}

// prepare ends what is not permitted any more, makes the links of VLANs, and reads the kernel. made is what failed of
// the links.
func (k *kernel) prepare(d plan.Desired) (made error, have observed, err error) {
	k.announcer.Set(both(k.announced, d.Announce))
	if err := k.permits.withdraw(d.Permits); err != nil {
		return nil, have, in("permits", err)
	}
	if have.links, err = k.observeLinks(); err != nil {
		return nil, have, in("addresses", err)
	}
	// Routes lead to them.
	made = in("VLAN links", k.applyLinks(k.diffLinks(d.VLAN).Links()))
	if have.routes, err = k.observeRoutes(); err != nil {
		return nil, have, in("routes", err)
	}
	if have.tables, err = k.tables.Observe(); err != nil {
		return nil, have, in("nftables", err)
	}
	return made, have, nil
}

// write writes what differs from what was read. before is what failed of it already.
func (k *kernel) write(ctx context.Context, d plan.Desired, have observed, before error) (applied bool, err error) {
	addrs, moves := k.diffLinks(d.VLAN), k.diffRoutes(d.Routing)
	errs := []error{before, in("addresses", k.applyLinks(addrs.Removes())), in("routes", k.applyRoutes(moves.NoLocals()))}
	if !addrs.Removes().Empty() {
		if have.links, err = k.observeLinks(); err != nil {
			return false, in("addresses", err)
		}
	}
	if !moves.NoLocals().Empty() {
		if have.routes, err = k.observeRoutes(); err != nil {
			return false, in("routes", err)
		}
	}
	rules := k.differ.Diff(have.tables, k.tablesState(d.NFT, have))

	arrive := func(part routing.Changes) { errs = append(errs, in("routes", k.applyRoutes(part))) }
	// Where the tables are not whole, as after a boot, they come before the overlay is up: what it brings would pass
	// without them, and leave with this node's own address.
	whole := len(rules.Repairs) == 0
	if arrive(moves.Links()); whole {
		arrive(moves.Entries())
	}
	fast, err := k.narrowFast(d.NFT)
	errs = append(errs, in("fast path", err))
	if err := k.tables.Apply(rules); err != nil {
		// Without its guard no address may come, and without the new tables no route may go.
		return false, errors.Join(append(errs, in("nftables", err))...)
	}
	if !whole {
		arrive(moves.Entries())
	}
	k.logChanges(ctx, "addresses", addrs)
	k.logChanges(ctx, "routes", moves)
	k.logChanges(ctx, "nftables", rules)
	k.countResets(moves.Loosened, moves.Loose)
	errs = append(errs, in("conntrack", k.flusher.follow(rules, d)))
	granted := k.permits.grant(d.Permits)
	if granted != nil {
		errs = append(errs, in("permits", fmt.Errorf("renewing permits: %w", granted)))
	}
	errs = append(errs,
		in("addresses", k.applyLinks(addrs.Adds())), in("routes", k.applyRoutes(moves.Locals())), in("routes", k.applyRoutes(moves.Removes())),
		in("fast path", k.applyFast(fast)))
	if granted == nil {
		k.announced = d.Announce
		k.announcer.Set(d.Announce)
	}
	return true, errors.Join(errs...)
}

// tablesState returns what the tables hold, beside what links and routes hold: the guard follows the address. It goes
// when the address was seen to be gone, and what makes it local.
func (k *kernel) tablesState(want nft.State, have observed) nft.State {
	want.AddressGuard = slices.Concat(want.AddressGuard, have.links.Addresses(), have.routes.Locals())
	want.Renewal = k.permits.renewal
	return want
}

// countResets counts how often somebody else set rp_filter of a link of Egret's, and says so. loosened are those that
// are not loose, loose the others that there are: one that is not loose and was not there in the reconcile before is new.
func (k *kernel) countResets(loosened, loose []string) {
	now := map[string]int{}
	for _, link := range slices.Concat(loosened, loose) {
		n, known := k.resets[link]
		if !known {
			k.metrics.add(metricResets, 0, link) // see newMetrics
		} else if slices.Contains(loosened, link) {
			n++
			k.metrics.add(metricResets, 1, link)
			k.log.Warn("rp_filter was reset, and is loose again", "link", link, "times", n)
		}
		now[link] = n
	}
	k.resets = now
}

// logChanges says and counts what changed in a part of the kernel: one line a change, and a steady state is silent. The
// lines of the ruleset itself, which is the same on every node, are for debugging.
func (k *kernel) logChanges(ctx context.Context, part string, changes fmt.Stringer) {
	n := 0
	for line := range strings.Lines(changes.String()) {
		n++
		level := slog.LevelInfo
		if _, nft := changes.(nft.Changes); nft && !strings.Contains(line, " element ") {
			level = slog.LevelDebug
		}
		k.log.Log(ctx, level, "kernel changed", "change", strings.TrimRight(line, "\n"))
	}
	k.metrics.changes(part, n)
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
