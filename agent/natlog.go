package agent

import (
	"cmp"
	"context"
	"hash/maphash"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/egret-project/egret/conntrack"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
)

const (
	// maxFlows bounds the connections of which it is remembered how they began, some 300 bytes each: the kernel has no
	// more by default on a node with 4 GB and more (nf_conntrack_max). The end of a further one is logged by what is
	// known then.
	maxFlows = 1 << 18
	// listEvery is how often all connections are listed as long as there are some of whose end the kernel may not tell;
	// listShare bounds the time that takes, as portsShare.
	listEvery = time.Minute
	listShare = 20
	// formerFor is for how long the name of a pod that is gone is remembered, for connections that end then.
	formerFor = 10 * time.Minute
	// lastLines is how long an agent that ends waits for the log to be written.
	lastLines = time.Second
	// lastEvents is how long it reads what the kernel has told already, which takes milliseconds.
	lastEvents = 300 * time.Millisecond
)

// natLogger logs connections as the kernel tells of them.
type natLogger struct {
	natLogConfig
	out    *natlog.Writer
	file   io.Closer
	filter flowFilter
	seed   maphash.Seed

	// What follows belongs to run.
	names *names
	flows map[uint64]*flow
	quiet int             // how many flows there are of whose end the kernel may not tell
	ended map[uint64]bool // while a listing goes on: what ended since it began
	lost  bool            // events were lost since the last listing
	noted bool            // what the kernel does not keep was looked at
	listings
}

// natLogConfig is what a natLogger works with.
type natLogConfig struct {
	cfg      NATLog
	node     string
	version  string
	log      *slog.Logger
	snapshot func() *egress.Snapshot
	listen   func() (*conntrack.Events, error)
	list     func() ([]conntrack.Flow, error)
	metrics  *metrics      // nil: nobody asks
	every    time.Duration // 0: listEvery
	most     int           // 0: maxFlows
	written  func()        // called after each batch, for tests; nil: nothing is
}

// listings are the listings of connections, of which one goes on at a time.
type listings struct {
	listing chan listed   // nil: none goes on
	listed  time.Time     // when the last one ended
	rest    time.Duration // and how long no other begins
}

type listed struct {
	began time.Time
	flows []conntrack.Flow
	err   error
}

// newNATLogger returns what logs; nil: the log is off.
func newNATLogger(cfg natLogConfig) (*natLogger, error) {
	if cfg.cfg.File == "" {
		return nil, nil
	}
	var err error
	n := &natLogger{natLogConfig: cfg}
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
		Out: out, Node: n.node, Log: n.log, Torn: n.cfg.File != StandardOutput && natlog.Torn(n.cfg.File),
		Wrote:  func(lines int) { metrics.add(metricLogLines, lines) },
		Missed: func(r natlog.Reason, lines int) { metrics.add(metricLogLost, lines, string(r)) },
	})
	return n, nil
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
	if !n.noted { // conntrack and its settings are there by now
		n.noted = true
		n.noteUnkept("/proc/sys/net/netfilter")
	}
	// A listing is looked at between events, and where there are none for a while: it wakes who waits for events no
	// other way.
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

// keeping are the settings with which the kernel keeps what a line is to have, and what that is. They are the node's,
// for all that use conntrack, so the agent sets none.
var keeping = []struct{ setting, what string }{
	{"nf_conntrack_acct", "traffic"}, {"nf_conntrack_timestamp", "the kernel's start and stop"},
}

// noteUnkept logs what lines will lack since these settings are off, as they are by default; dir is where they are.
func (n *natLogger) noteUnkept(dir string) {
	var lack, remedy []string
	for _, k := range keeping {
		b, err := os.ReadFile(filepath.Join(dir, k.setting))
		if err == nil && strings.TrimSpace(string(b)) == "0" { // else it is on, or nobody can tell
			lack, remedy = append(lack, k.what), append(remedy, "net.netfilter."+k.setting+"=1")
		}
	}
	if len(lack) > 0 {
		n.log.Warn("lines of the log of connections will lack what the kernel does not keep", "lack", strings.Join(lack, ", "),
			"remedy", "sysctl -w "+strings.Join(remedy, " ")+", for connections that begin after that")
	}
}

// event is one of the kernel's, or how many of them are missing.
type event struct {
	conntrack.Flow
	end  bool
	lost int
}

// relist begins a listing where one is due: when the log begins, after a loss, and now and then while there are
// connections of whose end the kernel may not tell.
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

// line says of a connection what does not change.
func (n *natLogger) line(f *flow) natlog.Line {
	l := f.names.line(n.node, &f.is)
	l.Sample, l.Start = n.sample(), f.is.Start
	if l.Start.IsZero() && !f.known {
		l.Start = f.since
	}
	return l
}
