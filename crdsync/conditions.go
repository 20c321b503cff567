package crdsync

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
)

// maxNamed is how many of one kind a message names: a person reads it, and an event takes 1024 bytes.
const maxNamed = 3

// clusterState is what etcd shows about the owners of addresses, and the nodes that could own them.
type clusterState struct {
	// Snapshot has the pools and nodes that crdsync writes, and the agents, owners and cordons that others do; the rest
	// is empty.
	egress.Snapshot
	load map[string]int // how many owners each node is
	// faulty are the nodes that run pods of an egress and could not program everything, by egress, sorted.
	faulty map[string][]string
	// droppers are the nodes that drop packets of an egress IP, sorted.
	droppers map[netip.Addr][]string
}

// egressStatus returns the status of an egress. old is what it was: a condition keeps its time while its status stays.
func egressStatus(old v1beta1.EgressStatus, v verdict, s clusterState, now time.Time) v1beta1.EgressStatus {
	var out v1beta1.EgressStatus
	var from, held, missing []string
	for _, a := range v.addresses {
		if a.Pool == "" {
			from = append(from, a.IP.String()+" is a static egress IP")
		} else {
			from = append(from, fmt.Sprintf("%s is of pool %s", a.IP, a.Pool))
		}
		out.Addresses = append(out.Addresses, v1beta1.EgressAddress{IP: a.IP.String(), Node: s.Owners[a.IP].Node})
		if o, ok := s.Owners[a.IP]; ok {
			held = append(held, fmt.Sprintf("%s is on node %s", a.IP, o.Node))
		} else {
			missing = append(missing, s.unowned(a))
		}
	}
	if len(v.addresses) > 0 {
		out.EgressIP, out.EgressNode = out.Addresses[0].IP, out.Addresses[0].Node
	}
	allocated := v1beta1.EgressCondition{
		Type: v1beta1.IPAllocated, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonAllocated, Message: strings.Join(from, "; "),
	}
	if v.err != nil {
		allocated.Status, allocated.Reason, allocated.Message = metav1.ConditionFalse, v1beta1.ReasonAllocationError, line(v.err)
	}
	assigned := v1beta1.EgressCondition{
		Type: v1beta1.IPAssigned, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonAssigned, Message: strings.Join(held, "; "),
	}
	if len(v.addresses) == 0 {
		missing = []string{"no egress IP is allocated"}
	}
	if len(missing) > 0 {
		assigned.Status, assigned.Reason, assigned.Message = metav1.ConditionFalse, v1beta1.ReasonAssignmentError, strings.Join(missing, "; ")
	}
	conditions := []v1beta1.EgressCondition{allocated, assigned}
	if c, ok := conflict(v); ok {
		conditions = append(conditions, c)
	}
	if c, ok := s.degraded(v); ok {
		conditions = append(conditions, c)
	}
	for _, c := range conditions {
		c.ObservedGeneration = v.generation
		c.LastTransitionTime = metav1.NewTime(now.Truncate(time.Second)) // as the API keeps it
		for _, o := range old.Conditions {
			if o.Type == c.Type && o.Status == c.Status && !o.LastTransitionTime.IsZero() {
				c.LastTransitionTime = o.LastTransitionTime
			}
		}
		out.Conditions = append(out.Conditions, c)
	}
	return out
}

// conflict returns the condition of an egress that is not the first to ask for something; ok is false for all others.
func conflict(v verdict) (c v1beta1.EgressCondition, ok bool) {
	c = v1beta1.EgressCondition{Type: v1beta1.Conflict, Status: metav1.ConditionTrue, Reason: v1beta1.ReasonOverlappingSelection}
	var said []string
	if v.duplicate != nil {
		c.Reason, said = v1beta1.ReasonDuplicateIP, append(said, line(v.duplicate))
	}
	if v.overlap != "" {
		said = append(said, v.overlap)
	}
	c.Message = strings.Join(said, "; ")
	return c, len(said) > 0
}

// degraded returns the condition of an egress for which a node could not program everything, drops its packets, or has
// too few ports, or whose address a host outside the cluster uses as well; ok is false for all others. The nodes that
// hold its addresses come first: they serve all its pods.
func (s clusterState) degraded(v verdict) (c v1beta1.EgressCondition, ok bool) {
	var nodes []string
	for _, a := range v.addresses {
		if n := s.Owners[a.IP].Node; len(s.Agents[n].Faults) > 0 && !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	for _, n := range s.faulty[v.name] {
		if !slices.Contains(nodes, n) {
			nodes = append(nodes, n)
		}
	}
	var said []string
	for _, n := range nodes[:min(len(nodes), maxNamed)] {
		faults := s.Agents[n].Faults
		for _, part := range slices.Sorted(maps.Keys(faults)) {
			said = append(said, fmt.Sprintf("node %s: %s: %s", n, part, faults[part]))
		}
	}
	if more := len(nodes) - maxNamed; more > 0 {
		said = append(said, fmt.Sprintf("and %d more nodes", more))
	}
	reason := v1beta1.ReasonProgrammingError
	for _, a := range v.addresses {
		if o, held := s.Owners[a.IP]; held && s.Agents[o.Node].Conflicts[a.IP] != "" {
			if len(said) == 0 {
				reason = v1beta1.ReasonAddressInUse
			}
			said = append(said, fmt.Sprintf("node %s: %s: another host uses it too, %s", o.Node, a.IP, s.Agents[o.Node].Conflicts[a.IP]))
		}
	}
	if dropped := s.dropped(v); len(dropped) > 0 {
		if len(said) == 0 {
			reason = v1beta1.ReasonTrafficDropped
		}
		said = append(said, dropped...)
	}
	if v.ports != "" {
		if len(said) == 0 {
			reason = v1beta1.ReasonPortsExhausted
		}
		said = append(said, v.ports)
	}
	return v1beta1.EgressCondition{Type: v1beta1.Degraded, Status: metav1.ConditionTrue, Reason: reason, Message: strings.Join(said, "; ")}, len(said) > 0
}

// dropped says which nodes drop packets of an egress, and why, a few of them.
func (s clusterState) dropped(v verdict) (said []string) {
	for _, a := range v.addresses {
		for _, n := range s.droppers[a.IP] {
			if len(said) < maxNamed {
				said = append(said, fmt.Sprintf("node %s: %s: %s", n, a.IP, s.Agents[n].Dropped[a.IP]))
			}
		}
	}
	return said
}

// unowned says why no node holds an address.
func (s clusterState) unowned(a egress.Address) string {
	return plan.Unowned(&s.Snapshot, a, func(node string) int { return s.load[node] })
}

// line returns an error's text on one line.
func line(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// equalStatus reports whether two statuses say the same.
func equalStatus(a, b v1beta1.EgressStatus) bool {
	return a.EgressIP == b.EgressIP && a.EgressNode == b.EgressNode && slices.Equal(a.Addresses, b.Addresses) &&
		slices.EqualFunc(a.Conditions, b.Conditions, func(x, y v1beta1.EgressCondition) bool {
			same := x.LastTransitionTime.Equal(&y.LastTransitionTime)
			x.LastTransitionTime, y.LastTransitionTime = metav1.Time{}, metav1.Time{}
			return same && x == y
		})
}
