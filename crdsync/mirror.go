package crdsync

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// A write that was refused because the cache is behind works once it has caught up, milliseconds later; one that
	// etcd does not answer is tried less and less often.
	minBackoff = 20 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// mirror is the reconciler: it writes into etcd what the Kubernetes API shows. Its methods are for one goroutine.
type mirror struct {
	source  *source
	cache   *store.Cache
	lead    *store.Leadership
	dirty   *dirty
	publish func(control)
	log     *slog.Logger
	// clusterCIDRs are as Config's.
	clusterCIDRs []netip.Prefix

	// What was derived from source last, to be derived again where it is dirty.
	objects           objects
	nodes             map[string]egress.Node // of objects, by name
	faults            map[string]error       // of reading objects
	control           control                // as it is in etcd since the last pass that planned
	selection         *selection
	overlaps          map[string]string // of selection
	publishedOverlaps map[string]string // the overlaps that were published last
	// node -> the egresses of which the cache lists members there, under either key
	listed    map[string]map[string]bool
	reported  map[string]string   // faults that were logged
	ownerless map[netip.Addr]bool // IPs whose owners are gone since the last pass
	collect   func(control)       // called once, after the first pass
	refused   refusals
	blocks    blocks
	metrics   *metrics // nil: nobody asks
	pressure  pressure // of blocks
	// publishedPressure is the pressure that was published last.
	publishedPressure pressure
}

// begin makes the mirror ready for its first pass, which has to compare all objects.
func (m *mirror) begin() {
	m.reported, m.ownerless = map[string]string{}, map[netip.Addr]bool{}
	m.blocks.begin(m.cache.Revision())
	m.cache.TakeChanged() // what is there now is listed below, and what changes from here on comes with the next call
	m.listed = listedMembers(m.cache)
	m.blocks.read(m.cache, m.listed)
}

// run mirrors until the leadership is over, or ctx ends.
func (m *mirror) run(ctx context.Context) error {
	m.begin()
	w := work{objects: true}
	for wait := minBackoff; ; {
		began := time.Now()
		err := m.pass(ctx, &w)
		if ctx.Err() == nil {
			m.metrics.passed(began, w.since, err)
		}
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, store.ErrNotLeader):
			return err
		case err != nil:
			m.dirty.add(w)
			if !errors.Is(err, store.ErrConflict) || wait == maxBackoff {
				m.log.Warn("writing to etcd failed, will retry", "err", err, "dur", wait)
			}
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return ctx.Err()
			}
			wait = min(2*wait, maxBackoff)
		default:
			wait = minBackoff
			var retry <-chan time.Time
			var first time.Time
			for _, at := range []time.Time{m.refused.next(), m.blocks.next()} {
				if at.IsZero() {
					continue
				}
				if soon := time.After(time.Until(at)); retry == nil || at.Before(first) {
					retry, first = soon, at
				}
			}
			select {
			case <-retry:
			case <-m.dirty.wake:
			case <-m.cache.Changed():
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		w = m.dirty.take()
	}
}

// pass compares what w says may have changed with what etcd shows, and writes the difference. It adds to w what else it
// finds changed. The cost of a pod's event does not depend on how many egresses and pods there are: only its node is
// compared.
func (m *mirror) pass(ctx context.Context, w *work) error {
	m.recordsChanged(w)
	m.refused.begin(time.Now(), w)
	now := view{m.cache, m.cache.Revision()}
	c, have := m.control, records{}
	var puts, deletes []unit
	planned := w.objects || w.nodes || w.records
	if planned {
		w.records = true // also when this pass fails
		if w.objects || w.nodes {
			m.objects, m.faults = m.source.objects()
			m.nodesChanged(w)
		}
		have = readRecords(m.cache)
		c = newControl(m.objects, have, time.Now().UTC().Truncate(time.Second), m.isListed)
		maps.Copy(c.faults, m.faults)
		m.blocks.reported(c.faults)
		m.report(c.faults)
		m.addressesChanged(c, w)
		var err error
		if puts, deletes, err = controlDifference(now, c); err != nil {
			return err
		}
	}
	members, err := m.members(now, w, c)
	if err != nil {
		return err
	}
	to := &writer{mirror: m, c: c, have: have, blocked: map[string]bool{}}
	// What has rested comes last: its history is put, and a full etcd, which refuses that, takes the other deletes.
	if err := to.write(ctx, slices.Concat(puts, members, deletes, m.dependents(c), m.blocks.rested(time.Now()))); err != nil {
		return err
	}
	if m.blocks.shortChanged {
		m.pressure, m.blocks.shortChanged = m.blocks.pressure(), false
	}
	unchanged := maps.Equal(m.publishedOverlaps, m.overlaps) && m.publishedPressure.equal(m.pressure)
	if w.records || !unchanged {
		c.verdicts = maps.Clone(c.verdicts) // the status may be reading what was published
		for name, v := range c.verdicts {
			v.overlap, v.ports = m.overlaps[name], m.pressure.egresses[name]
			c.verdicts[name] = v
		}
		c.pressed = m.pressure.pools
	}
	if planned {
		m.refused.addTo(c)
	}
	m.control = c
	clear(m.ownerless)
	if m.collect != nil {
		m.collect(c)
		m.collect = nil
	}
	if w.records || w.cluster || !unchanged {
		m.publishedOverlaps, m.publishedPressure = m.overlaps, m.pressure
		m.publish(c)
	}
	return nil
}

// recordsChanged adds to w what changed in etcd since the last pass: its own writes, which its cache may not have shown
// yet when it compared, and those of others.
func (m *mirror) recordsChanged(w *work) {
	m.blocks.renew(m.cache.Revision())
	for _, key := range m.cache.TakeChanged() {
		node, name := "", ""
		if rest, ok := strings.CutPrefix(key, store.MembersByNode); ok {
			node, name, _ = strings.Cut(rest, "/")
		} else if rest, ok := strings.CutPrefix(key, store.MembersByEgress); ok {
			name, node, _ = strings.Cut(rest, "/")
		}
		switch {
		case node != "" && name != "":
			w.addPods(node)
			w.cluster = w.cluster || m.atFault(node) // the status names the egresses that have pods there
			m.list(node, name)
			m.blocks.membersChanged(m.cache, node, name)
		case strings.HasPrefix(key, store.BlockPrefix):
			m.blocks.recordChanged(m.cache, key, w)
		case strings.HasPrefix(key, store.PodPrefix):
			w.addPods(strings.TrimPrefix(key, store.PodPrefix))
		case strings.HasPrefix(key, store.OwnerPrefix), strings.HasPrefix(key, store.AgentPrefix), strings.HasPrefix(key, store.CordonPrefix):
			w.cluster = true
			if strings.HasPrefix(key, store.OwnerPrefix) {
				m.ownerGone(key)
			} else if node, ok := strings.CutPrefix(key, store.AgentPrefix); ok && m.blocks.agentChanged(m.cache, node) {
				w.addPods(node)
			}
		default:
			w.records = true
		}
	}
}

// atFault reports whether the agent of a node says that it could not program everything.
func (m *mirror) atFault(node string) bool {
	r, ok := m.cache.Get(store.AgentKey(node))
	if !ok {
		return false
	}
	a, err := store.Decode[egress.Agent](r)
	return err == nil && len(a.Faults) > 0
}

// list notes whether the cache lists members of an egress on a node.
func (m *mirror) list(node, name string) {
	for _, key := range []string{store.MembersByNodeKey(node, name), store.MembersByEgressKey(name, node)} {
		if _, ok := m.cache.Get(key); ok {
			if m.listed[node] == nil {
				m.listed[node] = map[string]bool{}
			}
			m.listed[node][name] = true
			return
		}
	}
	delete(m.listed[node], name)
	if len(m.listed[node]) == 0 {
		delete(m.listed, node)
	}
}

// addressesChanged adds to w the nodes with pods of egresses whose addresses are to be others: their blocks of ports
// are, too.
func (m *mirror) addressesChanged(c control, w *work) {
	changed := map[string]bool{}
	for key, v := range c.values {
		if p, ok := v.(egress.Policy); ok && !slices.Equal(p.Addresses, policyOf(m.control, p.Name).Addresses) {
			changed[strings.TrimPrefix(key, store.EgressPrefix)] = true
		}
	}
	if len(changed) == 0 {
		return
	}
	for node, names := range m.listed {
		for name := range names {
			if changed[name] {
				w.addPods(node)
				break
			}
		}
	}
}

// policyOf returns the record that an egress is to have; the zero Policy: none.
func policyOf(c control, name string) egress.Policy {
	p, _ := c.values[store.EgressKey(name)].(egress.Policy)
	return p
}

// members returns what has to change of the members, with their blocks of ports, and of the ranges: those of the nodes
// whose pods changed, by themselves or by the labels of their namespace, or all when the egresses did.
func (m *mirror) members(now view, w *work, c control) ([]unit, error) {
	claimants := c.claimants
	if w.records && (m.selection == nil || !slices.EqualFunc(m.selection.claimants, claimants, sameClaim)) {
		w.objects = true // also when this pass fails
	}
	var nodes []string
	if w.objects {
		m.selection = newSelection(claimants, m.source.namespaceLabels, m.isListed)
		nodes = slices.AppendSeq(append(m.source.nodesWithPods(), m.nodesWithRanges()...), maps.Keys(m.listed))
		nodes = slices.AppendSeq(nodes, maps.Keys(m.blocks.byNode))
	} else {
		for namespace := range w.namespaces {
			for _, node := range m.selection.relabelled(namespace, m.source.podsBy(byNamespace, namespace)) {
				w.addPods(node)
			}
		}
		nodes = slices.Collect(maps.Keys(w.pods))
	}
	if len(nodes) == 0 && !w.objects {
		return nil, nil
	}
	slices.Sort(nodes)
	var out []unit
	var errs error
	stale := w.objects
	at := time.Now().UTC().Truncate(time.Second)
	for _, node := range slices.Compact(nodes) {
		lost := m.selection.losses[node]
		pods := m.source.podsBy(byNode, node)
		ranges, err := m.rangeDifference(now, node, pods)
		out, errs = append(out, ranges...), errors.Join(errs, err)
		groups := m.selection.group(node, pods, m.source.owns)
		stale = stale || !maps.Equal(lost, m.selection.losses[node])
		_, exists := m.nodes[node]
		changes, err := m.blocks.divide(node, groups, func(name string) egress.Policy { return policyOf(c, name) }, exists, at)
		errs = errors.Join(errs, err)
		units, err := memberDifference(now, node, groups, m.listed[node], changes)
		out, errs = append(out, units...), errors.Join(errs, err)
	}
	if stale { // they are those of all nodes
		m.overlaps = m.selection.overlaps()
	}
	return out, errs
}

func sameClaim(a, b claimant) bool { return a.name == b.name && slices.Equal(a.families, b.families) }

// isListed reports whether etcd lists a pod as one of an egress.
func (m *mirror) isListed(egressName string, p pod) bool {
	r, ok := m.cache.Get(store.MembersByNodeKey(p.node, egressName))
	if !ok {
		return false
	}
	members, err := store.Decode[egress.Members](r)
	return err == nil && slices.ContainsFunc(members.Pods, func(o egress.Member) bool { return o.Pod == p.name })
}

// logChanges logs which addresses and ports changed hands.
func (m *mirror) logChanges(ops []store.Op, c control, have records) {
	for _, op := range ops {
		if what, n := m.blocks.logText(op); what != "" {
			m.log.Info(what, "egress_ip", n.IP, "ports", fmt.Sprintf("%d-%d", n.First, n.Last()), "node", n.Node)
		}
		text, ok := strings.CutPrefix(op.Key, store.AllocationPrefix)
		if !ok || op.Value == nil && op.Absent {
			continue
		}
		if a, ok := c.values[op.Key].(egress.Allocation); ok {
			m.log.Info("egress IP allocated", "egress_ip", text, "egress", a.Egresses, "pool", a.Pool)
		} else if ip, err := netip.ParseAddr(text); err == nil {
			m.log.Info("egress IP released", "egress_ip", text, "egress", have.allocations[ip].Egresses, "pool", have.allocations[ip].Pool)
		}
	}
}

// report logs what is wrong, once for as long as it stays the same.
func (m *mirror) report(faults map[string]error) {
	now := map[string]string{}
	for _, what := range slices.Sorted(maps.Keys(faults)) {
		now[what] = line(faults[what])
		if m.reported[what] != now[what] {
			m.log.Warn("object or record is faulty, all others go on", "err", what+": "+now[what])
		}
	}
	m.reported = now
}
