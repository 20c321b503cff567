package operator

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/plan"
	"github.com/egret-project/egret/store"
)

// Question is what Trace answers: how a pod leaves.
type Question struct {
	Pod string     // namespace/name
	To  netip.Addr // the zero Addr: to anywhere outside
	// Protocol is what egress.Protocol takes, Port the port of To, of TCP, UDP or SCTP; "" and 0: any.
	Protocol string
	Port     uint16
	// Live has a packet of the pod to To followed through the kernels; nil: not.
	Live *Live
	// Namespace is where Egret is installed, for commands that tell more; "": none is told.
	Namespace string
}

// Of makes it a question about what has a protocol (see egress.Protocol; "": any, and TCP where there is a port) and is
// for a port of To; 0: any. Its error begins with "to", "protocol" or "port", of which it is.
func (q *Question) Of(protocol string, port int) error {
	if to := q.To; to.IsValid() && (!to.IsGlobalUnicast() || to.Zone() != "") {
		return fmt.Errorf("to %s: want a global unicast address, without a zone: no loopback, link-local or multicast one", to)
	}
	if protocol == "" && port != 0 {
		protocol = "tcp"
	}
	if protocol == "" {
		return nil
	}
	n, err := egress.Protocol(protocol, q.To)
	switch ported := n == unix.IPPROTO_TCP || n == unix.IPPROTO_UDP || n == unix.IPPROTO_SCTP; {
	case err != nil:
		return fmt.Errorf("protocol %w", err)
	case port != 0 && (port < 0 || port > 65535 || !ported):
		return fmt.Errorf("port %d: want one of TCP, UDP or SCTP, 1 to 65535", port)
	case port != 0 && !q.To.IsValid():
		return fmt.Errorf("port %d: want the address that it is a port of", port)
	}
	q.Protocol, q.Port = protocol, uint16(port)
	return nil
}

// protocol returns the number of the protocol, of packets of an address; 0: any.
func (q Question) protocol(from netip.Addr) byte {
	if q.Protocol == "" {
		return 0
	}
	n, _ := egress.Protocol(q.Protocol, from) // was checked by trace
	return n
}

// destination says in words what the packets are for.
func (q Question) destination() string {
	text := q.To.String()
	if q.Port != 0 {
		text = fmt.Sprintf("%s port %d", text, q.Port)
	}
	if q.Protocol != "" {
		text += " (" + protocolName(q.Protocol) + ")"
	}
	return text
}

// protocolName is what a protocol is called in a sentence.
func protocolName(name string) string {
	if name != "" && name[0] >= '0' && name[0] <= '9' {
		return "protocol " + name
	}
	return name
}

// Step is one on the way of a pod's packet.
type Step struct {
	What  string `json:"what"`
	Text  string `json:"text"`
	Fault fault  `json:"fault,omitempty"`
	// Family is "IPv4" or "IPv6" where the step is of the way of one of them alone.
	Family string `json:"family,omitempty"`
	// Kernels: of the last step of a way, that all nodes on it said what their kernels have.
	Kernels bool `json:"kernels,omitempty"`
	// unowned: it says that no node holds the egress IP.
	unowned bool
}

// fault says what a step means for the packet; empty: it goes on.
type fault string

const (
	stops  fault = "stops"  // it does not leave, or nothing comes back
	doubts fault = "doubts" // it leaves as far as etcd tells, and something may be in its way
	passes fault = "passes" // it leaves as if there were no egress
	drops  fault = "drops"  // it does not leave, as the egress is for the other family alone
)

// longest bounds the text of a step, in bytes: parts of it are what agents, and others by records, have chosen.
const longest = 2000

// addTo returns what adds steps to a list.
func addTo(steps *[]Step) adds {
	return func(what string, f fault, format string, a ...any) {
		*steps = append(*steps, Step{What: what, Text: Printable(fmt.Sprintf(format, a...), longest), Fault: f})
	}
}

// Trace writes why a pod leaves with the address that it has outside, step by step, and last a verdict in one sentence,
// in a format: "json", "yaml" or "" for text. It goes by the records in etcd, and by what the agents of the nodes on
// the way say of their kernels when they are asked at page; nil: they are not. A kernel of which nothing is known is
// taken to do what the records say, unless its agent reports otherwise there. The error is a Verdict when it does not
// get through, or something may be in its way.
func Trace(ctx context.Context, c *store.Client, q Question, ask Ask, page, format string, w io.Writer) error {
	if err := CheckReport(format); err != nil {
		return err
	}
	whole, err := c.ReadWhole(ctx)
	if err != nil {
		return err
	}
	kernels := askKernels(ctx, ask, page)
	steps, err := trace(whole, q, time.Now(), kernels)
	if err != nil {
		return err
	}
	if _, status := conclude(steps); status != 0 && kernels != nil {
		// What kernels have of a move that happened meanwhile is no fault.
		if now, err := c.ReadWhole(ctx); err == nil && moved(whole, now, q.Pod) {
			whole = now
			if steps, err = trace(whole, q, time.Now(), kernels); err != nil {
				return err
			}
		}
	}
	if slices.ContainsFunc(steps, func(s Step) bool { return s.unowned }) && c.AskNoSpace(ctx) {
		noSpace(steps)
	}
	if q.Live != nil {
		steps = append(steps, follow(ctx, whole, q, ask)...)
	}
	text, status := conclude(steps)
	err = writeReport(w, format, map[string]any{"steps": steps, "verdict": text}, func() error {
		var rows [][]string
		for _, s := range steps {
			mark := map[fault]string{stops: "!! ", doubts: "?  "}[s.Fault]
			rows = append(rows, []string{s.What, mark + s.Text})
		}
		if err := writeTable(w, "", rows); err != nil {
			return err
		}
		_, err := fmt.Fprintf(w, "\n%s\n", text)
		return err
	})
	if err != nil || status == 0 {
		return err
	}
	return Verdict{status, text, true}
}

// noSpace adds that etcd is full to the steps that say that no node holds an IP.
func noSpace(steps []Step) {
	for i := range steps {
		if steps[i].unowned {
			steps[i].Text += "; etcd is full (NOSPACE), and none can take it until there is room: `egret check` says how full"
		}
	}
}

// moved reports whether a pod, or an owner of an IP of it, changed from one reading of the records to the next.
func moved(before, after store.Whole, pod string) bool {
	list := find(before, pod)
	if !slices.EqualFunc(list, find(after, pod), podAt.same) {
		return true
	}
	for _, p := range list {
		then, now := before.Egresses[p.egress].Addresses, after.Egresses[p.egress].Addresses
		if !slices.Equal(then, now) {
			return true
		}
		for _, a := range now {
			was, is := before.Owners[a.IP], after.Owners[a.IP]
			if was.Node != is.Node || was.Revision != is.Revision || before.Moves[a.IP].To != after.Moves[a.IP].To {
				return true
			}
		}
	}
	return false
}

// conclude returns the verdict, and the exit status that it means: 0, the pod leaves as it should; 2, it does not; 3,
// something may be in its way. Where the steps are of both families each has a verdict, and the status is that of the
// worse one.
func conclude(steps []Step) (string, int) {
	var texts []string
	worst := 0
	for _, family := range []string{"IPv4", "IPv6"} {
		if !slices.ContainsFunc(steps, func(s Step) bool { return s.Family == family }) {
			continue
		}
		text, status := concludeWay(slices.DeleteFunc(slices.Clone(steps), func(s Step) bool { return s.Family != "" && s.Family != family }))
		texts = append(texts, family+": "+text)
		if status == 2 || worst == 0 {
			worst = status
		}
	}
	if len(texts) == 2 {
		return strings.Join(texts, " "), worst
	}
	text, status := concludeWay(steps)
	if status == 0 && slices.ContainsFunc(steps, func(s Step) bool { return s.Fault == drops }) {
		status = 2 // the pod has no other family by which it leaves
	}
	return text, status
}

// concludeWay is conclude for the steps of one family.
func concludeWay(steps []Step) (string, int) {
	for _, f := range []fault{stops, passes, drops, doubts} {
		i := slices.IndexFunc(steps, func(s Step) bool { return s.Fault == f })
		if i < 0 {
			continue
		}
		switch s := steps[i]; f {
		case stops:
			return "It does not get through: " + s.Text + ".", 2
		case passes:
			text := "It leaves as if there were no egress, with the address that the CNI gives to it: " + s.Text
			if i := slices.IndexFunc(steps, func(s Step) bool { return s.Fault == doubts }); i >= 0 {
				return text + ", but: " + steps[i].Text + ".", 3
			}
			return text + ".", 0
		case drops:
			return "It is dropped: " + s.Text + ".", 0
		default:
			return by(steps) + " it gets through, " + result(steps) + ", but: " + s.Text + ".", 3
		}
	}
	return by(steps) + " it gets through, " + result(steps) + ".", 0
}

// by says what the verdict goes by: each way has the kernels of all its nodes, or it is etcd.
func by(steps []Step) string {
	last := slices.DeleteFunc(slices.Clone(steps), func(s Step) bool { return s.What != "leaves" })
	if len(last) > 0 && !slices.ContainsFunc(last, func(s Step) bool { return !s.Kernels }) {
		return "As the kernels of its nodes tell"
	}
	return "As far as etcd tells"
}

// result says how a packet leaves, by the last way.
func result(steps []Step) string {
	for _, s := range slices.Backward(steps) {
		if s.What == "leaves" {
			return s.Text
		}
	}
	return steps[len(steps)-1].Text
}

// trace returns the steps of a pod's way, one way after the other where it has addresses of both families, and last
// how to ask agents that are not reached from here. The last step of a way says how it leaves; where one stops it, the
// others are still told. An error: etcd has no such pod.
func trace(w store.Whole, q Question, now time.Time, ask kernelsFor) ([]Step, error) {
	var beyond []string
	steps, err := ways(w, q, now, ask.noting(&beyond))
	if err != nil {
		return nil, err
	}
	if len(beyond) > 0 {
		addTo(&steps)("not asked", "", "%s", q.unasked(beyond))
	}
	return steps, nil
}

// ways is trace but for the agents that are not reached.
func ways(w store.Whole, q Question, now time.Time, ask kernelsFor) ([]Step, error) {
	var steps []Step
	step := addTo(&steps)
	if _, err := egress.Protocol(q.Protocol, q.To); q.Protocol != "" && err != nil {
		return nil, fmt.Errorf("protocol %w", err)
	}
	list := find(w, q.Pod)
	if len(list) == 0 {
		return nil, fmt.Errorf("etcd has no pod %s: it is no namespace/name of a pod that runs, it has no address yet, it is on the network of its node "+
			"(such pods have no egress), or crdsync has not written it (`egret status`)", q.Pod)
	}
	step("pod", "", "%s with %s", q.Pod, places(list))
	if !slices.ContainsFunc(list, podAt.selected) {
		step("selection", passes, "no egress selects it: labels of the pod and its namespace are not what any egress's appliedTo asks for")
		beside(w, list, q, ask, step)
		return steps, nil
	}
	if q.To.IsValid() && !q.toOutside(w, step) {
		beside(w, list, q, ask, step)
		return steps, nil
	}
	if q.To.IsValid() {
		list = slices.DeleteFunc(list, func(p podAt) bool { return p.ip.Is4() != q.To.Is4() })
	}
	switch {
	case len(list) == 0:
		step("address", stops, "the pod has no address of the family of %s", q.To)
	case !slices.ContainsFunc(list, podAt.selected):
		step("selection", passes, "the egress that selects it is for the other family alone: none applies to %s", list[0].ip)
		beside(w, list, q, ask, step)
		return steps, nil
	}
	for _, p := range list {
		if !p.selected() {
			continue
		}
		first := len(steps)
		step("selection", "", "%s is selected by egress %s%s", p.ip, p.egress, alsoBy(p.also))
		steps = append(steps, leaves(w, p, q, now, ask)...)
		for i := range steps[first:] {
			steps[first+i].Family = familyOf(p.ip)
		}
	}
	return steps, nil
}

// beside adds what is known of the nodes of a pod's addresses to which no egress applies. A kernel whose agent learns of
// nothing new may have one that applied before.
func beside(w store.Whole, list []podAt, q Question, ask kernelsFor, step adds) {
	seen := map[string]bool{}
	for _, p := range list {
		if q.To.IsValid() && q.To.Is4() != p.ip.Is4() {
			continue
		}
		if !seen[p.node] {
			agentAt(w, p.node, step)
		}
		seen[p.node] = true
		if ask != nil {
			k := ask(w, egress.KernelQuestion{Pod: p.ip, To: q.To, Protocol: q.protocol(p.ip), Port: q.Port}, p.node, "")
			k.kernelBeside(w, p, step)
		}
	}
}

// alsoBy names the egresses that select a pod in vain.
func alsoBy(names []string) string {
	switch more := strings.Join(names, ", "); len(names) {
	case 0:
		return ""
	case egress.MaxAlso:
		return fmt.Sprintf("; %s, and perhaps more, select it too: the oldest applies", more)
	default:
		return fmt.Sprintf("; selected by %s too: the oldest applies", more)
	}
}

// toOutside adds the step about the destination, and reports whether the way goes on.
func (q Question) toOutside(w store.Whole, step adds) bool {
	why := excepted(&w.Snapshot, q.To)
	// Of what is a node's the nodes take it before they look for whom it is: nft.CounterForeign.
	if node := nodeAt(&w.Snapshot, q.To); node != "" && q.Port == egress.OverlayPort && q.protocol(q.To) == 17 {
		step("destination", stops, "UDP port %d of %s, an address of node %s, is the overlay's: what others than nodes send there is dropped (overlay_foreign)",
			egress.OverlayPort, q.To, node)
		return false
	}
	if why != "" {
		step("destination", passes, "%s is %s, to which no egress applies", q.destination(), why)
		if strings.HasPrefix(why, "of ServiceCIDR") {
			step("destination", "", "where the Service leads outside the cluster, what counts is the address of its endpoint: ask for that")
		}
		return false
	}
	if of := egressAt(&w.Snapshot, q.To); of != "" {
		icmp, _ := egress.Protocol("icmp", q.To) // a name that there is
		if n := q.protocol(q.To); n == 0 || n == icmp {
			step("destination", doubts, "%s is an egress IP, of %s: nodes drop what is sent there but echo requests (ping), and those of a pod may not get there either", q.To, of)
		} else {
			step("destination", stops, "%s is an egress IP, of %s: nodes drop what is sent there but echo requests (ping)", q.To, of)
		}
		return true
	}
	step("destination", "", "%s is outside, unless --egress.exceptCIDRs or --cluster-cidrs of the agents name it, which etcd does not know", q.destination())
	return true
}

// nodeAt returns the node that has an address as its own; "": none.
func nodeAt(s *egress.Snapshot, ip netip.Addr) string {
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if slices.Contains(s.Nodes[name].Addresses, ip) {
			return name
		}
	}
	return ""
}

// egressAt returns the egresses that have an IP of a pool; "": none. A static one is an address of a node, at which
// that has its services.
func egressAt(s *egress.Snapshot, ip netip.Addr) string {
	var names []string
	for _, name := range slices.Sorted(maps.Keys(s.Egresses)) {
		if slices.ContainsFunc(s.Egresses[name].Addresses, func(a egress.Address) bool { return a.IP == ip && a.Pool != "" }) {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

func familyOf(ip netip.Addr) string {
	if ip.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// excepted says what of the cluster a destination is; "": nothing.
func excepted(s *egress.Snapshot, to netip.Addr) string {
	in := func(list []netip.Prefix) bool {
		return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(to) })
	}
	if name := nodeAt(s, to); name != "" {
		return "an address of node " + name
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		if in(s.Nodes[name].PodCIDRs) {
			return "of the pods of node " + name
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Pods)) {
		if in(s.Pods[name].CIDRs) {
			return "of the cluster's pods"
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Services)) {
		if in(s.Services[name].CIDRs) {
			return "of ServiceCIDR " + name
		}
	}
	return ""
}

// leaves returns the steps from the pod's node on, for an address of a pod that an egress applies to.
func leaves(w store.Whole, p podAt, q Question, now time.Time, ask kernelsFor) (steps []Step) {
	step := addTo(&steps)
	name, node, pod := p.egress, p.node, p.ip
	policy, known := w.Egresses[name]
	var a egress.Address
	if i := slices.IndexFunc(policy.Addresses, func(a egress.Address) bool { return a.IP.Is4() == pod.Is4() }); i >= 0 {
		a = policy.Addresses[i]
	}
	owner, held := w.Owners[a.IP]
	var k kernels
	if ask != nil {
		k = ask(w, egress.KernelQuestion{Pod: pod, IP: a.IP, ID: a.ID, To: q.To, Protocol: q.protocol(pod), Port: q.Port}, node, owner.Node)
	}
	switch {
	case k.excepted(w, q, node, step):
		return steps
	case !known:
		step("egress", stops, "egress %s is gone, and its record of pods not yet", name)
		return steps
	case !a.IP.IsValid() && len(policy.Addresses) > 0 && !q.To.IsValid(): // of whom it is asked whether it leaves as it should, and it does
		step("address", drops, "egress %s has no %s address, and what %s sends is dropped: `kubectl describe egress %s` says whether it is to have one",
			name, familyOf(pod), pod, name)
		return steps
	case !a.IP.IsValid():
		step("address", stops, "egress %s has no address of the family of %s, and what it sends is dropped: `kubectl describe egress %s` says why", name, pod, name)
		return steps
	}
	step("address", "", "%s, %s", a.IP, addressText(w, a, now))
	home(w, node, a.IP, step)
	if held {
		k.kernelHere(w, q, pod, a, node, owner.Node, step)
	}
	if !held {
		step("owner", stops, "%s", unowned(plan.New(&w.Snapshot), a))
		steps[len(steps)-1].unowned = true
		return steps
	}
	gateway(w, owner, node, k.said[owner.Node].Permit > 0, step)
	k.kernelThere(w, a, node, owner.Node, step)
	if m, moving := w.Moves[a.IP]; moving {
		step("move", "", "to %s, asked for %s ago: both forward meanwhile", m.To, age(now, m.Since))
	}
	way := fmt.Sprintf("as %s by its own node %s", a.IP, node)
	if owner.Node != node {
		way = fmt.Sprintf("as %s by gateway %s", a.IP, owner.Node)
		tunnel(w, node, owner.Node, step)
		k.overlay(w, pod, node, owner.Node, step)
	}
	ports(w, q, name, node, a, step)
	out(w, owner, a, step)
	k.exit(w, a, owner.Node, step)
	if b := policy.Bandwidth; b != nil {
		step("limit", "", "%d bit/s, bursts of %d bits, all pods together: what is above is dropped", b.Rate, b.Burst)
		k.limited(owner.Node, step)
	}
	step("leaves", "", "%s", way)
	steps[len(steps)-1].Kernels = k.asked(node, owner.Node)
	return steps
}

// home adds the steps on the pod's node.
func home(w store.Whole, node string, ip netip.Addr, step adds) {
	if plan.Gone(&w.Snapshot, node) {
		step("pod's node", stops, "node %s has no record: its Node object is gone, or crdsync has not written it, and no gateway lets its pods out", node)
	}
	agentAt(w, node, step)
	if why := w.Agents[node].Dropped[ip]; why != "" {
		step("pod's node", stops, "%s drops it: %s", node, why)
	}
}

// agentAt adds what the records say of the agent of the pod's node.
func agentAt(w store.Whole, node string, step adds) {
	a, alive := w.Agents[node]
	switch {
	case !alive:
		step("pod's node", doubts, "the agent of %s is down: its kernel has what it was last told, and learns of nothing new", node)
	case a.Restarting:
		step("pod's node", doubts, "the agent of %s was told to stop, and no other one has come yet: its kernel has what it was last told", node)
	default:
		step("pod's node", "", "%s, its agent %s is alive", node, dash(a.Version))
	}
	for _, part := range slices.Sorted(maps.Keys(a.Faults)) {
		step("pod's node", doubts, "%s cannot program its %s: %s", node, part, a.Faults[part])
	}
}

// gateway adds the steps about the owner, and those on its node where that is not the pod's.
// permitted: its kernel was seen to have a permit, which goes before what the records say of its agent.
func gateway(w store.Whole, o egress.Owner, home string, permitted bool, step func(string, fault, string, ...any)) {
	lock := func(what string, f fault, format string, a ...any) {
		if f == stops && permitted {
			f, format = doubts, format+"; its kernel has a permit all the same"
		}
		step(what, f, format, a...)
	}
	a, alive := w.Agents[o.Node]
	switch {
	case !alive:
		lock("owner", stops, "%s has the lock of %s, and its agent is down: the kernel there is silent, and another node takes over when the lease ends", o.Node, o.IP)
	case a.Lease != egress.FormatLease(o.Lease):
		lock("owner", stops, "%s", ofFormer(o, a))
	case plan.Gone(&w.Snapshot, o.Node):
		lock("owner", stops, "%s has the lock of %s, and there is no such node: it serves nothing", o.Node, o.IP)
	case a.Restarting:
		lock("owner", doubts, "%s holds %s, and its agent is being restarted: the kernel there serves on for --restart-grace", o.Node, o.IP)
	default:
		lock("owner", "", "%s holds %s, its agent is alive under the lease of the lock (revision %d)", o.Node, o.IP, o.Revision)
	}
	if by := a.Conflicts[o.IP]; by != "" {
		step("owner", doubts, "another host uses %s, and may get the answers: %s", o.IP, by)
	}
	if o.Node == home {
		return
	}
	if why := a.Dropped[o.IP]; why != "" {
		step("owner", stops, "%s drops it: %s", o.Node, why)
	}
	for _, part := range slices.Sorted(maps.Keys(a.Faults)) {
		step("owner", doubts, "%s cannot program its %s: %s", o.Node, part, a.Faults[part])
	}
}

// tunnel adds the steps from the pod's node to the gateway.
func tunnel(w store.Whole, from, to string, step func(string, fault, string, ...any)) {
	src, dst := w.Nodes[from], w.Nodes[to]
	switch {
	case len(src.Addresses) == 0 || len(dst.Addresses) == 0:
		step("tunnel", stops, "%s or %s has no address in its record: there is no overlay between them", from, to)
	case src.Index == 0 || dst.Index == 0:
		step("tunnel", stops, "%s or %s has no index: crdsync gives one (its log says why not)", from, to)
	default:
		step("tunnel", "", "VXLAN from %s (%s) to %s (%s), UDP port %d, VNI %d", from, src.Addresses[0], to, dst.Addresses[0], egress.OverlayPort, egress.OverlayVNI)
	}
}

// ports adds the step that translates, with its ports.
func ports(w store.Whole, q Question, name, node string, a egress.Address, step adds) {
	block, ok := egress.Current(w.ByEgress[name][node].Blocks, a.IP)
	if n := q.protocol(a.IP); n != 0 && !egress.HasPorts(n, a.IP) {
		where := fmt.Sprintf("on %s, to an address of %s for the overlay, and at the gateway to %s", node, node, a.IP)
		if w.Owners[a.IP].Node == node {
			where = fmt.Sprintf("on %s, to %s", node, a.IP)
		}
		step("translation", "", "%s: %s has no ports, so it is by conntrack there that its connections are known, and not by a block: another gateway learns "+
			"them anew, and those of one node's pods to one destination are one", where, protocolName(q.Protocol))
		return
	}
	switch {
	case ok:
		kind := "ports"
		if icmp, _ := egress.Protocol("icmp", a.IP); q.protocol(a.IP) == icmp { // a name that there is
			kind = "identifiers of echo requests"
		}
		step("translation", "", "on %s, to %s and %s %d-%d", node, a.IP, kind, block.First, block.Last())
		if want := w.Agents[node].Ports[a.IP].Want; want > block.Size {
			step("translation", doubts, "%s asks for %d ports of %s and has %d: more than three quarters of them are in use to one destination", node, want, a.IP, block.Size)
		}
	case a.Pool == "":
		step("translation", "", "at the gateway, to %s: a static IP has no blocks", a.IP)
	default:
		step("translation", doubts, "at the gateway: %s has no ports of %s of its own (`egret get blocks %s`), so connections end with the gateway", node, a.IP, a.IP)
	}
}

// out adds the step in which the packet leaves the gateway.
func out(w store.Whole, o egress.Owner, a egress.Address, step func(string, fault, string, ...any)) {
	pool := w.Pools[a.Pool]
	if why := w.Agents[o.Node].Refused[a.Pool]; why != "" && a.Pool != "" {
		step("way out", stops, "%s cannot serve pool %s: %s", o.Node, a.Pool, why)
	}
	switch s := pool.Subnet; {
	case s == nil:
		step("way out", "", "by the routes of %s", o.Node)
	case s.VLAN != 0:
		step("way out", "", "by link %s (VLAN %d of the switch has to reach %s), gateway %s of %s", egress.VLANLink(s.VLAN), s.VLAN, o.Node, s.Gateway, s.Prefix())
	default:
		step("way out", "", "by gateway %s of %s", s.Gateway, s.Prefix())
	}
}
