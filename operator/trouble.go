package operator

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Level says how bad a trouble is.
type Level string

// The levels.
const (
	Broken   Level = "broken"   // traffic of some pods does not flow
	Degraded Level = "degraded" // it flows, or should, and something needs a person
	Noted    Level = "noted"    // a person has allowed it; all is well otherwise
)

// Trouble is something that is wrong.
type Trouble struct {
	Level Level  `json:"level"`
	What  string `json:"what"` // "egress web", "node node-1", "etcd"
	Why   string `json:"why"`  // and what to do
}

// troublesOf returns what is wrong as far as etcd tells, what is broken first. The zero Space: etcd's members were not
// asked.
func troublesOf(w store.Whole, space store.Space) []Trouble {
	var out []Trouble
	say := func(l Level, what, format string, a ...any) {
		out = append(out, Trouble{l, what, fmt.Sprintf(format, a...)})
	}
	if space.Fault != nil {
		say(Degraded, "etcd", "%s", strings.ReplaceAll(space.Fault.Error(), "\n", "; "))
	}
	if space.NoSpace {
		say(Degraded, "etcd", "it is full (NOSPACE): traffic goes on, and nothing changes hands until there is room; crdsync makes some where it can")
	}
	cluster := plan.New(&w.Snapshot)
	for _, name := range slices.Sorted(maps.Keys(w.Egresses)) {
		p := w.Egresses[name]
		if len(p.Addresses) == 0 {
			say(Broken, "egress "+name, "it has no address, and what its pods send to the outside is dropped: `kubectl describe egress %s` says why", name)
		}
		for _, a := range p.Addresses {
			o, owned := w.Owners[a.IP]
			if !owned {
				say(Broken, "egress "+name, "%s", unowned(cluster, a))
			} else if r, alive := w.Agents[o.Node]; alive && r.Lease != egress.FormatLease(o.Lease) {
				say(Broken, "egress "+name, "%s", ofFormer(o, r))
			}
		}
	}
	for _, node := range slices.Sorted(maps.Keys(w.Agents)) {
		a := w.Agents[node]
		for _, ip := range slices.SortedFunc(maps.Keys(a.Dropped), netip.Addr.Compare) {
			say(Broken, "node "+node, "%s: %s", ip, a.Dropped[ip])
		}
		for _, ip := range slices.SortedFunc(maps.Keys(a.Conflicts), netip.Addr.Compare) {
			say(Broken, "node "+node, "%s is used by another host: %s", ip, a.Conflicts[ip])
		}
		for _, part := range slices.Sorted(maps.Keys(a.Faults)) {
			say(Degraded, "node "+node, "%s: %s", part, a.Faults[part])
		}
		for _, pool := range slices.Sorted(maps.Keys(a.Refused)) {
			say(Degraded, "node "+node, "it cannot hold IPs of pool %s: %s", pool, a.Refused[pool])
		}
		if plan.Gone(&w.Snapshot, node) {
			say(Degraded, "node "+node, "its agent runs, and there is no such node: its Node object was deleted, or crdsync has not written the record")
		}
	}
	for _, node := range slices.Sorted(maps.Keys(w.Nodes)) {
		if a, alive := w.Agents[node]; !alive {
			say(Degraded, "node "+node, "its agent is down: `kubectl get pods -A -o wide -l app.kubernetes.io/name=egret-agent` says whether it runs")
		} else if a.Restarting {
			say(Degraded, "node "+node, "its agent was told to stop, and no other one has come yet")
		}
	}
	exposed := map[string][]string{}
	for _, node := range slices.Sorted(maps.Keys(w.Agents)) {
		if why := w.Agents[node].Exposed; why != "" {
			exposed[why] = append(exposed[why], node)
		}
	}
	for _, why := range slices.Sorted(maps.Keys(exposed)) {
		say(Noted, "etcd", "agents speak to it %s, as --insecure allows, so that who reaches it gives egress IPs to any node: %s", why, first(exposed[why], 3))
	}
	if w.Leader == "" {
		say(Degraded, "crdsync", "none leads: new pods and egresses wait; a look at its pods and logs says why")
	}
	for _, f := range w.Faults {
		say(Degraded, "record "+f.Key, "it cannot be read: %v", f.Err)
	}
	worstFirst(out)
	return out
}

// first writes some of a list, and how many more there are.
func first(list []string, most int) string {
	if len(list) <= most {
		return strings.Join(list, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(list[:most], ", "), len(list)-most)
}

func worstFirst(list []Trouble) {
	// by the alphabet, as it is
	slices.SortStableFunc(list, func(a, b Trouble) int { return cmp.Compare(a.Level, b.Level) })
}

// unowned says why no node holds an address, as far as etcd tells.
func unowned(c *plan.Cluster, a egress.Address) string {
	return plan.Unowned(c.Snapshot, a, c.Owned)
}

// ofFormer says that a lock is one of its node's former agent, which the agent of now does not act upon.
func ofFormer(o egress.Owner, r egress.Agent) string {
	return fmt.Sprintf("%s has the lock of %s under lease %s of a former agent: this one (lease %s) does not answer for it",
		o.Node, o.IP, egress.FormatLease(o.Lease), r.Lease)
}
