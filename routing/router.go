package routing

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// Config is what a Router works with.
type Config struct {
	Log *slog.Logger // nil: silent
}

// Router reads and writes the kernel. Its methods may be called from any goroutine; only whether IPv6 is on cannot be
// asked through a socket, and is read in the network namespace of the calling thread.
type Router struct {
	log    *slog.Logger
	handle *netlink.Handle
	// filtered has strict checking on, which makes the kernel itself leave out the routes of others, of which there may
	// be a million. The library's other dumps fail with it.
	filtered *netlink.Handle
	raw      map[int]*nl.SocketHandle // for what the library has no call for
}

// New returns a Router of the network namespace of the calling thread. It writes nothing.
func New(cfg Config) (*Router, error) {
	r := &Router{log: cfg.Log}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	var err error
	if r.handle, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	if r.filtered, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		r.Close()
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	if err := r.filtered.SetStrictCheck(true); err != nil {
		r.log.Debug("kernel does not filter routes, all are read", "err", err)
	}
	s, err := nl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_ROUTE)
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	r.raw = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: {Socket: s}}
	return r, nil
}

// Close closes the Router's sockets. The kernel keeps what it has.
func (r *Router) Close() {
	for _, h := range []*netlink.Handle{r.handle, r.filtered} {
		if h != nil {
			h.Close()
		}
	}
	for _, s := range r.raw {
		s.Close()
	}
}

func (r *Router) request(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = r.raw
	return req
}

// Apply makes changes: first all that add, in an order in which each finds what it needs, then those that remove, the
// other way round. It goes on after an error and returns all of them, joined; those about the way out to one subnet are
// egress.ExitErrors. Making the same changes again is no error.
func (r *Router) Apply(c Changes) error {
	w := &writer{Router: r, devs: map[string]netlink.Link{}, reported: map[report]bool{}}
	var errs []error
	for _, o := range slices.Concat(c.links, c.adds, c.comes, c.goes, c.removes) {
		err := o.run(w)
		if err == nil || errors.Is(err, errNoLink) && w.reported[report{o.exit, err.Error()}] {
			continue // without the link, one error is as good as a thousand
		}
		w.reported[report{o.exit, err.Error()}] = true
		err = fmt.Errorf("applying %q: %w", o.line, err)
		if o.exit != 0 {
			err = egress.ExitError{Mark: o.exit, Err: err}
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Delete removes all that is ours. Nothing there is no error.
func (r *Router) Delete() error {
	have, err := r.Observe()
	if err != nil {
		return err
	}
	return r.Apply(Diff(have, State{}))
}

// errNoLink says that a link of ours is not there.
var errNoLink = errors.New("no link")

// errForeignRoute says that a route of another protocol has the place of one of ours.
var errForeignRoute = errors.New("another program's route is in its place")

// writer is one run of Apply.
type writer struct {
	*Router
	devs     map[string]netlink.Link // those that are known
	reported map[report]bool
}

// report is an error that Apply has in its list.
type report struct {
	exit egress.Mark
	text string
}

// link returns the link of the name as it is now.
func (w *writer) link(name string) (netlink.Link, error) {
	if w.devs[name] == nil {
		dev, err := w.handle.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return nil, fmt.Errorf("%w %s", errNoLink, name)
		} else if err != nil {
			return nil, err
		}
		w.devs[name] = dev
	}
	return w.devs[name], nil
}

func (w *writer) index(name string) (int, error) {
	dev, err := w.link(name)
	if err != nil {
		return 0, err
	}
	return dev.Attrs().Index, nil
}

// forget makes the next call of link look again.
func (w *writer) forget() { clear(w.devs) }

// addRoute adds or appends a route over the link dev, "" for none. The kernel answers EEXIST both when the route itself
// is there and when another program's has its place: only the first is as good as done.
func (w *writer) addRoute(e entry, r netlink.Route, dev, verb string) error {
	var err error
	if dev != "" {
		if r.LinkIndex, err = w.index(dev); err != nil {
			return err
		}
	}
	do := map[string]func(*netlink.Route) error{"add": w.handle.RouteAdd, "append": w.handle.RouteAppend, "replace": w.handle.RouteReplace}[verb]
	if err = do(&r); !errors.Is(err, unix.EEXIST) {
		return err
	}
	there, err := w.routes(familyOf(prefixOf(r.Dst).Addr()))
	if err != nil || slices.ContainsFunc(there, func(t entry) bool { return t.key() == e.key() }) {
		return err
	}
	return errForeignRoute
}

// present drops the error of adding what is there.
func present(err error) error {
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// absent drops the errors of removing what is not there.
func absent(err error) error {
	for _, gone := range []error{unix.ENOENT, unix.ESRCH, unix.ENODEV, unix.EADDRNOTAVAIL, errNoLink} {
		if errors.Is(err, gone) {
			return nil
		}
	}
	return err
}
