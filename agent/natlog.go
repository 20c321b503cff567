package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

const (
	// maxFlows bounds the connections of which it is remembered how they began, some 300 bytes each: the kernel has no more by
	// default on a node with 4 GB and more (nf_conntrack_max). The end of a further one is logged by what is known then.
	maxFlows = 1 << 18
	// listEvery is how often all connections are listed as long as there are some of whose end the kernel may not tell; listShare bounds the time that
	// takes, as portsShare.
	listEvery = time.Minute
	listShare = 20
	// formerFor is for how long the name of a pod that is gone is remembered, for connections that end then.
	formerFor = 10 * time.Minute
	// lastLines is how long an agent that ends waits for the log to be written.
	lastLines = time.Second
	// lastEvents is how long it reads what the kernel has told already, which takes milliseconds.
	lastEvents = 300 * time.Millisecond
)

// NATLog says what is logged of connections, and where. The zero NATLog: nothing.
type NATLog struct {
	// File is where lines are written; StandardOutput: there. Empty: the log is off.
	File string
	// MaxSize is how large a file may become, in MB, Files how many former ones are kept, and Days for how long; 0: whatever their age.
	MaxSize, Files, Days int
	// Filter are what a connection has to be of to be logged: egress=NAME, namespace=NAME or ip=ADDRESS. Of several of one kind one is enough; of each
	// kind that there is, one has to be so. What cannot be told, as of a pod whose name is not known any more, is logged.
	Filter []string
	// Sample logs one connection in so many; 0 and 1: all.
	Sample int
}

// StandardOutput is the NATLog.File that is no file.
const StandardOutput = "-"

// Validate returns all that is wrong with it, by the options that commands have for it.
func (n NATLog) Validate() error {
	_, err := parseFilter(n.Filter)
	errs := []error{err}
	if n.Sample < 0 {
		errs = append(errs, fmt.Errorf("--nat-log-sample %d: want 1 for all connections, or N for one in N", n.Sample))
	}
	if n.File != "" && (n.MaxSize < 1 || n.Files < 0 || n.Days < 0) {
		errs = append(errs, fmt.Errorf("--nat-log-max-size %d, --nat-log-max-files %d, --nat-log-max-days %d: want 1 MB or more, and no negative number", n.MaxSize, n.Files, n.Days))
	}
	if n.File == "" && (len(n.Filter) > 0 || n.Sample > 1) {
		errs = append(errs, errors.New("--nat-log-filter and --nat-log-sample are about the log that --nat-log names: want that too"))
	}
	return errors.Join(errs...)
}

// flowFilter is what connections are logged of; a nil map: of all.
type flowFilter struct {
	egresses, namespaces map[string]bool
	ips                  map[netip.Addr]bool
}

func parseFilter(list []string) (f flowFilter, err error) {
	for _, text := range list {
		kind, value, _ := strings.Cut(text, "=")
		add := func(to *map[string]bool) {
			if *to == nil {
				*to = map[string]bool{}
			}
			(*to)[value] = true
		}
		switch ip, bad := netip.ParseAddr(value); {
		case value != "" && kind == "egress":
			add(&f.egresses)
		case value != "" && kind == "namespace":
			add(&f.namespaces)
		case kind == "ip" && bad == nil:
			if f.ips == nil {
				f.ips = map[netip.Addr]bool{}
			}
			f.ips[ip.Unmap()] = true
		default:
			err = errors.Join(err, fmt.Errorf("--nat-log-filter %q: want egress=NAME, namespace=NAME or ip=ADDRESS", text))
		}
	}
	return f, err
}

// has reports whether a line is to be logged.
func (f flowFilter) has(l *natlog.Line) bool {
	is := func(of map[string]bool, name string) bool { return of == nil || name == "" || of[name] }
	return is(f.egresses, l.Egress) && is(f.namespaces, l.PodNamespace) && (f.ips == nil || !l.EgressIP.IsValid() || f.ips[l.EgressIP])
}

// natLogger logs connections as the kernel tells of them.
type natLogger struct {
	cfg      NATLog
	node     string
	version  string
	log      *slog.Logger
	snapshot func() *egress.Snapshot
	listen   func() (*conntrack.Events, error)
	list     func() ([]conntrack.Flow, error)
	metrics  *metrics // nil: nobody asks
	out      *natlog.Writer
	file     io.Closer
	filter   flowFilter
	every    time.Duration // listEvery, but in tests
	most     int           // maxFlows, but in tests
	seed     maphash.Seed
	written  func() // for tests: after each batch; nil: none

	// What follows belongs to run.
	names   *names
	flows   map[uint64]*flow
	quiet   int             // how many flows there are of whose end the kernel may not tell
	ended   map[uint64]bool // while a listing goes on: what ended since it began
	lost    bool            // events were lost since the last listing
	listing chan listed     // nil: none goes on
	listed  time.Time       // when the last one ended
	rest    time.Duration   // and how long no other begins
}

// flow is what is remembered of a connection that was logged.
type flow struct {
	names   *named         // nil: it is none that is logged
	is      conntrack.Flow // without what was counted
	since   time.Time      // when the agent heard of it
	quiet   bool           // the kernel may not tell of its end
	missing bool           // the last listing did not have it
	known   bool           // it was there before: when it began is not known
}

type listed struct {
	began time.Time
	flows []conntrack.Flow
	err   error
}

// newNATLogger returns what logs; nil: the log is off.
func newNATLogger(n natLogger) (*natLogger, error) {
	var err error
	if n.cfg.File == "" {
		return nil, nil
	}
	if n.filter, err = parseFilter(n.cfg.Filter); err != nil {
		return nil, err
	}
	var out io.Writer = os.Stdout
	if n.cfg.File != StandardOutput {
		f := natlog.File(n.cfg.File, n.cfg.MaxSize, n.cfg.Files, n.cfg.Days)
		out, n.file = f, f
	}
	n.seed, n.names, n.flows = maphash.MakeSeed(), newNames(), map[uint64]*flow{}
	n.every, n.most = cmp.Or(n.every, listEvery), cmp.Or(n.most, maxFlows)
	for _, r := range natlog.Reasons {
		n.metrics.add(metricLogLost, 0, string(r))
	}
	metrics := n.metrics
	n.out = natlog.NewWriter(natlog.Config{
		Out: out, Node: n.node, Log: n.log,
		Wrote:  func(lines int) { metrics.add(metricLogLines, lines) },
		Missed: func(r natlog.Reason, lines int) { metrics.add(metricLogLost, lines, string(r)) },
	})
	return &n, nil
}

// run logs until ctx ends. Nothing that fails ends the agent: it is logged, and tried again.
func (n *natLogger) run(ctx context.Context) error {
	if n == nil {
		return nil
	}
	for n.snapshot() == nil { // whose pods they are is not known before
		if !sleep(ctx, 50*time.Millisecond) {
			return nil
		}
	}
	go n.out.Run() // not waited for beyond lastLines: a write may hang
	n.out.Write(&natlog.Line{Event: natlog.LogStart, Time: time.Now(), Node: n.node, Agent: n.version, Filter: n.cfg.Filter, Sample: n.sample()})
	defer func() {
		n.out.Write(&natlog.Line{Event: natlog.LogStop, Time: time.Now(), Node: n.node})
		if !n.out.Close(lastLines) {
			n.log.Warn("the log of connections is not written to its end")
		} else if n.file != nil {
			_ = n.file.Close() // all was written
		}
	}()
	for said := ""; ; {
		err := n.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err.Error() != said {
			said = err.Error()
			n.log.Warn("connections are not logged, will retry", "err", err)
		}
		n.out.Lose(natlog.LostSocket, 1, time.Now()) // how many is not known
		n.lost = true
		if !sleep(ctx, time.Second) {
			return nil
		}
	}
}

// follow logs until something fails.
func (n *natLogger) follow(ctx context.Context) error {
	events, err := n.listen()
	if err != nil {
		return err
	}
	defer events.Close()
	// A listing is looked at between events, and where there are none for a while: it wakes who waits for events no other way.
	batches, next := make(chan []event), make(chan []event, 2)
	next <- nil
	next <- nil
	failed := make(chan error, 1)
	go func() {
		defer close(batches)
		for {
			batch := (<-next)[:0]
			lost, err := events.Receive(
				func(f *conntrack.Flow) { batch = append(batch, event{Flow: *f}) },
				func(f *conntrack.Flow) { batch = append(batch, event{Flow: *f, end: true}) })
			if lost > 0 {
				batch = append(batch, event{lost: lost})
			}
			batches <- batch
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	defer func() {
		events.Close()
		for range batches { // it ends with the socket
			select {
			case next <- nil:
			default:
			}
		}
	}()
	tick := time.NewTicker(min(n.every, time.Second))
	defer tick.Stop()
	last := time.Now()
	n.relist()
	stopped, end, idle := ctx.Done(), (<-chan time.Time)(nil), (<-chan time.Time)(nil)
	for {
		select {
		case batch, ok := <-batches:
			if !ok {
				return <-failed
			}
			now := time.Now()
			n.names.follow(n.snapshot(), now)
			for i := range batch {
				n.take(&batch[i], last, now)
			}
			last = now
			next <- batch
		case l := <-n.listing:
			n.merge(l, time.Now())
		case <-tick.C:
		case <-idle:
			return ctx.Err()
		case <-end:
			return ctx.Err()
		case <-stopped:
			// What the kernel has told up to now is logged, or would be missing without being lost.
			stopped, end = nil, time.After(lastEvents)
		}
		if stopped == nil {
			idle = time.After(lastEvents / 10)
			continue
		}
		n.relist()
		if n.written != nil {
			n.written()
		}
	}
}

// event is one of the kernel's, or how many of them are missing.
type event struct {
	conntrack.Flow
	end  bool
	lost int
}

// relist begins a listing where one is due: when the log begins, after a loss, and now and then while there are connections of whose end the kernel may not
// tell.
func (n *natLogger) relist() {
	if n.listing != nil {
		return
	}
	since := time.Since(n.listed)
	if !n.listed.IsZero() && (since < n.rest || !n.lost && (n.quiet == 0 || since < n.every)) {
		return
	}
	n.lost, n.ended, n.listing = false, map[uint64]bool{}, make(chan listed, 1)
	to := n.listing
	go func() {
		l := listed{began: time.Now()}
		l.flows, l.err = n.list()
		to <- l // nobody may wait for it any more
	}()
}

// take takes in an event. What was lost was so since the batch before.
func (n *natLogger) take(e *event, since, now time.Time) {
	if e.lost > 0 {
		n.out.Lose(natlog.LostSocket, e.lost, since)
		n.lost = true
		return
	}
	k := n.key(&e.Flow)
	was := n.flows[k]
	if !e.end {
		if was != nil && was.quiet { // it was listed before its event was read: so the kernel tells of its end
			was.quiet = false
			n.quiet--
			return
		}
		n.begin(k, &e.Flow, natlog.New, now)
		return
	}
	if n.ended != nil {
		n.ended[k] = true
	}
	n.end(k, was, &e.Flow, now)
}

// begin logs that a connection began, or is there.
func (n *natLogger) begin(k uint64, c *conntrack.Flow, what natlog.Event, now time.Time) {
	if !n.sampled(c) {
		return // which is told from itself again
	}
	f := &flow{names: n.names.of(c), is: *c, since: now, quiet: what == natlog.Known, known: what == natlog.Known}
	l := n.line(f)
	l.Event, l.Time = what, now
	if n.filter.has(&l) {
		n.out.Write(&l)
	} else {
		f.names = nil
	}
	if old := n.flows[k]; old != nil && old.quiet {
		n.quiet--
	}
	if len(n.flows) < n.most || n.flows[k] != nil {
		n.flows[k] = f
		if f.quiet {
			n.quiet++
		}
	}
}

// end logs that a connection ended; was is what is remembered of it, nil: nothing.
func (n *natLogger) end(k uint64, was *flow, c *conntrack.Flow, now time.Time) {
	switch {
	case was != nil:
		delete(n.flows, k)
		if was.quiet {
			n.quiet--
		}
		if was.names == nil {
			return
		}
	case !n.sampled(c):
		return
	default:
		was = &flow{names: n.names.of(c), is: *c, known: true}
		if l := n.line(was); !n.filter.has(&l) {
			return
		}
	}
	l := n.line(was)
	l.Event, l.Time, l.Stop, l.Unseen = natlog.End, now, now, c == nil
	if c != nil {
		l.Answered = c.Replied
		if c.Counted {
			l.Traffic = &natlog.Traffic{SentPackets: c.Sent.Packets, SentBytes: c.Sent.Bytes, ReceivedPackets: c.Received.Packets, ReceivedBytes: c.Received.Bytes}
		}
		if !c.Start.IsZero() {
			l.Start = c.Start
		}
		if !c.Stop.IsZero() {
			l.Stop = c.Stop
		}
	}
	n.out.Write(&l)
}

// merge takes in a listing: what nobody has told of is logged as known, and what is gone for the second time as ended.
func (n *natLogger) merge(l listed, now time.Time) {
	n.listing, n.listed, n.rest = nil, now, max(listShare*now.Sub(l.began), min(n.every, time.Second))
	ended := n.ended
	n.ended = nil
	if l.err != nil {
		n.log.Warn("connections were not listed for the log of them, will retry", "err", l.err)
		n.lost = true
		return
	}
	n.names.follow(n.snapshot(), now)
	there := make(map[uint64]bool, len(l.flows))
	for i := range l.flows {
		k := n.key(&l.flows[i])
		there[k] = true
		if f := n.flows[k]; f != nil {
			f.missing = false
		} else if !ended[k] {
			n.begin(k, &l.flows[i], natlog.Known, now)
		}
	}
	for k, f := range n.flows {
		switch {
		case there[k] || !f.since.Before(l.began):
		case f.missing:
			n.end(k, f, nil, now)
		default:
			f.missing = true
			n.lost = n.lost || !f.quiet // it is looked at again soon: its end may be lost, or be in the queue
		}
	}
}

// key tells a connection from others: by the kernel's number of it, and its ends.
func (n *natLogger) key(c *conntrack.Flow) uint64 {
	return maphash.Comparable(n.seed, flowKey{c.ID, c.Protocol, c.SourcePort, c.DestinationPort, c.Source, c.Destination})
}

type flowKey struct {
	id          uint32
	protocol    uint8
	source, to  uint16
	from, where netip.Addr
}

func (n *natLogger) sample() int {
	if n.cfg.Sample > 1 {
		return n.cfg.Sample
	}
	return 0
}

// sampled reports whether a connection is one of those that are logged, always the same for all that is said of it, by whatever agent: by what is
// constant of it (FNV-1a, https://www.rfc-editor.org/rfc/rfc9923).
func (n *natLogger) sampled(c *conntrack.Flow) bool {
	if n.cfg.Sample <= 1 {
		return true
	}
	h := uint64(14695981039346656037)
	add := func(b byte) { h = (h ^ uint64(b)) * 1099511628211 }
	for _, ip := range []netip.Addr{c.Source, c.Destination} {
		for _, b := range ip.As16() {
			add(b)
		}
	}
	for _, v := range []uint32{c.ID, uint32(c.SourcePort)<<16 | uint32(c.DestinationPort), uint32(c.Protocol)} {
		add(byte(v >> 24))
		add(byte(v >> 16))
		add(byte(v >> 8))
		add(byte(v))
	}
	return (h>>32^h)%uint64(n.cfg.Sample) == 0
}

// line says of a connection what does not change.
func (n *natLogger) line(f *flow) natlog.Line {
	l := f.names.line(n.node, &f.is)
	l.Sample, l.Start = n.sample(), f.is.Start
	if l.Start.IsZero() && !f.known {
		l.Start = f.since
	}
	return l
}

// named is what connections of one pod by one egress IP have in common.
type named struct {
	egress          string
	ip              netip.Addr // the egress IP
	namespace, name string     // of the pod
	node            string     // of the pod, where it is another one
}

// names are the names of what connections have numbers and addresses of. It is safe for concurrent use.
type names struct {
	mu    sync.Mutex // guards what follows
	last  *egress.Snapshot
	pods  map[netip.Addr]podName
	ids   map[egress.ID]egressName
	nodes map[int]string // by index
	known map[namedKey]*named
}

type namedKey struct {
	source netip.Addr
	id     egress.ID
}

type podName struct {
	namespace, name string
	egresses        []string
	gone            time.Time // zero: it is there
}

type egressName struct {
	name string
	ip   netip.Addr
	of   *egress.Snapshot // that it was looked up in
}

func newNames() *names {
	return &names{pods: map[netip.Addr]podName{}, ids: map[egress.ID]egressName{}}
}

// follow takes over a snapshot.
func (n *names) follow(s *egress.Snapshot, now time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s == n.last || s == nil {
		return
	}
	n.last, n.nodes = s, nil
	n.known = map[namedKey]*named{}
	there := make(map[netip.Addr]podName, len(n.pods))
	for name, m := range s.ByNode {
		for _, p := range m.Pods {
			namespace, pod, _ := strings.Cut(p.Pod, "/")
			for _, ip := range p.IPs {
				is := podName{namespace: namespace, name: pod, egresses: there[ip].egresses}
				if name != egress.Unselected {
					is.egresses = append(is.egresses, name)
				}
				there[ip] = is
			}
		}
	}
	for ip, p := range n.pods {
		if _, ok := there[ip]; ok {
			continue
		}
		if p.gone.IsZero() {
			p.gone = now
		}
		if now.Sub(p.gone) < formerFor {
			there[ip] = p
		}
	}
	n.pods = there
}

// egressOf returns the name and the IP of an id; those that it had, where it has none now.
func (n *names) egressOf(id egress.ID, of []string) egressName {
	was := n.ids[id]
	has := func(name string) (netip.Addr, bool) {
		for _, a := range n.last.Egresses[name].Addresses {
			if a.ID == id {
				return a.IP, true
			}
		}
		return netip.Addr{}, false
	}
	for _, name := range of { // of a static IP there may be several
		if ip, ok := has(name); ok {
			return egressName{name: name, ip: ip}
		}
	}
	if was.of == n.last {
		return was
	}
	ip, ok := has(was.name)
	if !ok {
		for name := range n.last.Egresses {
			if ip, ok = has(name); ok {
				was.name = name
				break
			}
		}
	}
	if ok {
		was.ip = ip
	}
	was.of = n.last
	n.ids[id] = was
	return was
}

// nodeOf returns the name of a node by its index; "": it is gone.
func (n *names) nodeOf(index int) string {
	if n.nodes == nil {
		n.nodes = make(map[int]string, len(n.last.Nodes))
		for name, node := range n.last.Nodes {
			n.nodes[node.Index] = name
		}
	}
	return n.nodes[index]
}

// of returns what the connections of a pod by an egress IP have in common, as it is now.
func (n *names) of(c *conntrack.Flow) *named {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.last == nil {
		return &named{}
	}
	k := namedKey{c.Source, egress.ID(c.Mark & egress.Mark(egress.MaxID))}
	if is := n.known[k]; is != nil {
		return is
	}
	pod := n.pods[c.Source]
	e := n.egressOf(k.id, pod.egresses)
	is := &named{egress: e.name, ip: e.ip, namespace: pod.namespace, name: pod.name}
	if overlaid(c.Source) {
		is.node = n.nodeOf(indexOf(c.Source))
	}
	n.known[k] = is
	return is
}

// line says of a connection what does not change.
func (is *named) line(node string, c *conntrack.Flow) natlog.Line {
	l := natlog.Line{
		Version: natlog.Version, Node: node, PodIP: c.Source, PodPort: c.SourcePort, Protocol: protocolName(c.Protocol), DestinationIP: c.Destination,
		DestinationPort: c.DestinationPort, ID: c.ID, EgressIP: c.Translated, Port: c.Port,
		Egress: is.egress, PodNamespace: is.namespace, PodName: is.name, PodNode: is.node,
	}
	if overlaid(c.Translated) { // the gateway translates it once more
		l.OverlayIP, l.OverlayPort, l.EgressIP, l.Port = c.Translated, c.Port, is.ip, 0
	}
	if overlaid(c.Source) { // as it does here
		l.OverlayIP, l.OverlayPort, l.PodIP, l.PodPort = c.Source, c.SourcePort, netip.Addr{}, 0
	}
	return l
}

// overlaid reports whether an address is an egress.OverlaySource.
func overlaid(ip netip.Addr) bool {
	return egress.OverlaySources4.Contains(ip) || egress.OverlaySources6.Contains(ip)
}

// indexOf returns the index of the node that an egress.OverlaySource is of.
func indexOf(ip netip.Addr) int {
	b := ip.AsSlice()
	return int(b[len(b)-2])<<8 | int(b[len(b)-1])
}

// protocols are the names of the protocols that have ports or identifiers.
var protocols = map[uint8]string{
	unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_ICMPV6: "icmpv6", unix.IPPROTO_SCTP: "sctp",
	unix.IPPROTO_UDPLITE: "udplite", unix.IPPROTO_DCCP: "dccp", unix.IPPROTO_ESP: "esp", unix.IPPROTO_GRE: "gre",
}

func protocolName(n uint8) string { return cmp.Or(protocols[n], strconv.Itoa(int(n))) }
