package page

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/egret-project/egret/connlimit"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

// What viewers may cost.
const (
	maxViewers = 32
	// maxBehind is how many changes wait for a viewer that does not read. At two a second, it is some seconds behind
	// then.
	maxBehind = 16
	// partSize is how many objects a part of a change has: some 100 kB, which a browser takes in within a frame or two.
	partSize = 250
	// minPause is how long changes are gathered: a person sees two pictures a second as live, and a large cluster costs
	// some 50 ms for each.
	minPause = 500 * time.Millisecond
	// linger is for how long etcd is followed after the last look.
	linger = 15 * time.Second
	// spaceInterval is how often etcd's members are asked how full they are.
	spaceInterval = 30 * time.Second
	// spacePatience is how long they may take, and the end of Run be put off at most.
	spacePatience = 2 * time.Second
	// panicPause is how long the page rests after a panic, so that what ails it neither fills the log nor a core.
	panicPause = 5 * time.Second
	// patience is how long a request waits for etcd's first answer.
	patience = 10 * time.Second
)

var (
	errTooMany        = errors.New("too many look at this page already: close another one, and try again")
	errTooManyReviews = errors.New("too many tokens are being looked at already")
	errBusy           = errors.New("another question from your address is being answered: ask again")
	errNoEtcd         = errors.New("etcd has not answered yet: try again, or look at the log")
)

// Page is the status page. Its methods are safe for concurrent use.
type Page struct {
	client *store.Client
	log    *slog.Logger
	wanted chan struct{} // capacity 1: somebody looks

	questions queues
	looks     queues           // of traffic
	traces    queues           // which wait for agents, too
	gateways  *gateways        // nil: no agent is asked for traffic
	kernels   operator.Kernels // zero: none is asked for its kernel

	mu      sync.Mutex // guards what follows
	shown   *shown     // nil: nothing is known yet, or nobody looks
	first   chan struct{}
	looked  time.Time // when a request came last
	viewers []*viewer // the oldest first
}

// shown is what etcd held at a revision. Nothing in it changes.
type shown struct {
	whole   store.Whole
	tenures []egress.Tenure
	State

	once sync.Once // makes what follows
	text []byte    // all of State, as events
	err  error
}

// all returns the whole state as events, which is made once for all who come. It is not to be changed.
func (s *shown) all() ([]byte, error) {
	s.once.Do(func() { s.text, s.err = events(Diff(State{}, s.State, partSize)) })
	return s.text, s.err
}

// viewer is who is sent changes.
type viewer struct {
	client netip.Prefix
	events chan []byte // closed: it was dropped
}

// Agents are how agents are asked; the zero Agents: they are not, and the page shows what etcd holds.
type Agents struct {
	Traffic AskTraffic
	Kernels operator.Kernels
}

// New returns a Page of what etcd holds, and of what agents say. It answers while Run runs. log may be nil.
func New(client *store.Client, agents Agents, log *slog.Logger) *Page {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Page{client: client, log: log, wanted: make(chan struct{}, 1), first: make(chan struct{})}
	if agents.Traffic != nil {
		p.gateways = newGateways(agents.Traffic)
	}
	if p.kernels = agents.Kernels; p.kernels.Ask != nil {
		p.kernels.Ask = paced(p.kernels.Ask)
	}
	return p
}

// Run follows etcd while somebody looks, until ctx ends, and then returns nil. A panic is logged, drops who looks, and
// is followed by another attempt: crdsync is worth more than its page.
func (p *Page) Run(ctx context.Context) error {
	for {
		select {
		case <-p.wanted:
			if p.survive(func() { p.follow(ctx) }) {
				continue
			}
			select {
			case <-time.After(panicPause):
			case <-ctx.Done():
			}
		case <-ctx.Done():
			return nil
		}
	}
}

// survive reports whether f returned, and logs the panic that it ended with otherwise.
func (p *Page) survive(f func()) (returned bool) {
	defer func() {
		if v := recover(); v != nil {
			p.log.Error("status page failed, will retry: report this", "err", v, "stack", string(debug.Stack()))
		}
	}()
	f()
	return true
}

// follow shows etcd as it changes until ctx ends or nobody looks any more.
func (p *Page) follow(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	view := p.client.NewWholeView()
	var running sync.WaitGroup
	running.Go(func() { _ = view.Run(ctx) }) // the error is that of ctx
	spaces := make(chan store.Space)
	running.Go(func() { p.askSpace(ctx, spaces) })
	defer running.Wait()
	defer stop()
	defer p.end()
	look := time.NewTicker(time.Second)
	defer look.Stop()
	var space store.Space
	followed, said := false, ""
	for {
		select {
		case <-view.Changed():
		case space = <-spaces:
		case <-look.C:
			if p.unused() {
				return
			}
			if view.Healthy() == followed {
				continue
			}
		case <-ctx.Done():
			return
		}
		whole, tenures, ok := view.Whole()
		if !ok {
			continue
		}
		followed = view.Healthy()
		state, err := newState(operator.NewCluster(whole, tenures, space), system{Followed: followed, Traffic: p.gateways != nil})
		if err == nil {
			err = p.show(&shown{whole: whole, tenures: tenures, State: state})
		}
		if err != nil && err.Error() != said {
			said = err.Error()
			p.log.Warn("status page is not up to date", "err", err)
		}
		select {
		case <-time.After(minPause):
		case <-ctx.Done():
		}
	}
}

// askSpace sends how full etcd is, again and again. Where that is not known the page says nothing of it.
func (p *Page) askSpace(ctx context.Context, out chan<- store.Space) {
	for {
		// The end of ctx does not cut it off: an etcd that is closed while it answers this panics (server v3.7.3,
		// DetectSchemaVersion).
		asking, done := context.WithTimeout(context.WithoutCancel(ctx), spacePatience)
		space, err := p.client.Space(asking)
		if done(); err == nil {
			select {
			case out <- space:
			case <-ctx.Done():
			}
		}
		select {
		case <-time.After(spaceInterval):
		case <-ctx.Done():
			return
		}
	}
}

// show replaces what is shown, and sends viewers what changed. One that is too far behind is dropped: its browser comes
// again and gets the whole.
func (p *Page) show(next *shown) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown == nil {
		p.shown = next
		close(p.first)
		return nil
	}
	parts := Diff(p.shown.State, next.State, partSize)
	p.shown = next
	if len(parts) == 0 || len(p.viewers) == 0 {
		return nil
	}
	text, err := events(parts)
	for _, v := range slices.Clone(p.viewers) {
		if err == nil {
			select {
			case v.events <- text:
				continue
			default:
			}
		}
		p.drop(v)
	}
	return err
}

// drop ends the changes of a viewer. It is called with mu.
func (p *Page) drop(v *viewer) {
	if i := slices.Index(p.viewers, v); i >= 0 {
		p.viewers = slices.Delete(p.viewers, i, i+1)
		close(v.events)
	}
}

// unused reports whether nobody has looked for a while.
func (p *Page) unused() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.viewers) == 0 && time.Since(p.looked) > linger
}

// end forgets what was shown, and drops who looks: what they come for again starts anew.
func (p *Page) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown != nil {
		p.shown, p.first = nil, make(chan struct{})
	}
	for len(p.viewers) > 0 {
		p.drop(p.viewers[0])
	}
}

// current returns what is shown, and waits for it where nobody looked before.
func (p *Page) current(ctx context.Context) (*shown, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		p.mu.Lock()
		p.looked = time.Now()
		now, first := p.shown, p.first
		p.mu.Unlock()
		if now != nil {
			return now, nil
		}
		select {
		case p.wanted <- struct{}{}:
		default:
		}
		select {
		case <-first:
		case <-ctx.Done():
			return nil, errNoEtcd
		}
	}
}

// join makes a viewer of who asks, to whom the whole is sent first. Where there are too many, one of the client that has
// most goes, if that would still have as many as the new one's then: so no client keeps others out.
func (p *Page) join(ctx context.Context, client netip.Prefix) (*viewer, error) {
	now, err := p.current(ctx)
	if err != nil {
		return nil, err
	}
	text, err := now.all() // nobody else waits for that
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown == nil { // it has just ended
		return nil, errNoEtcd
	}
	if len(p.viewers) >= maxViewers {
		of := func(v *viewer) netip.Prefix { return v.client }
		over := p.viewers[connlimit.Crowding(p.viewers, of)]
		if p.has(over.client)-1 < p.has(client)+1 {
			return nil, errTooMany
		}
		p.drop(over)
	}
	if p.shown != now {
		since, err := events(Diff(now.State, p.shown.State, partSize))
		if err != nil {
			return nil, err
		}
		text = slices.Concat(text, since)
	}
	v := &viewer{client: client, events: make(chan []byte, maxBehind)}
	v.events <- text
	p.viewers = append(p.viewers, v)
	return v, nil
}

// has returns how many viewers a client has. It is called with mu.
func (p *Page) has(client netip.Prefix) (n int) {
	for _, v := range p.viewers {
		if v.client == client {
			n++
		}
	}
	return n
}

// leave ends the changes of a viewer.
func (p *Page) leave(v *viewer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.drop(v)
	p.looked = time.Now()
}
