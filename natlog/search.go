package natlog

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	// maxLine is more than a line has; what is longer is none of the log's.
	maxLine = 64 << 10
	// MaxUses bounds how many connections an answer has: a port serves as many as there are destinations.
	MaxUses = 1000
	// lossNear is how far from the time in question a loss may have hidden what was asked for: after one the agent
	// lists what there is within seconds.
	lossNear = time.Minute
	// heardLate is how late an agent may have heard of a connection: where nobody had the port at the time, connections
	// that began so soon after it are returned.
	heardLate = 500 * time.Millisecond
)

// Question is who had a port of an egress IP, or, on the node of a pod for which a gateway translates, of its overlay
// address (Line.OverlayIP).
type Question struct {
	IP   netip.Addr
	Port uint16
	// From and To are the time in question, To not included; a moment is as long as it was said precisely.
	From, To time.Time
	// Destination and Protocol choose some connections; the zero Addr and "": all.
	Destination netip.Addr
	Protocol    string // as Line has it
}

// Chooses reports whether a connection of the port is one of those that are asked for.
func (q Question) Chooses(l *Line) bool {
	return (!q.Destination.IsValid() || l.DestinationIP == q.Destination) && (q.Protocol == "" || l.Protocol == q.Protocol)
}

// Answer is what a log says. Uses are its connections, one Line each: with Start, where that is known, and Stop, where
// it has ended; the Event is New or Known, as they began, or End where only the end was logged.
type Answer struct {
	Uses []Line `json:"uses"`
	// More says that there are more Uses than are listed.
	More bool `json:"more,omitempty"`
	// Late says that the Uses began within half a second after the time in question, when nobody had the port: an agent
	// hears of a connection a moment after it began.
	Late bool `json:"late,omitempty"`
	// Missing says why something may be missing, one reason each; empty: the log has all of that time.
	Missing []string `json:"missing,omitempty"`
	// Last is the time of the last line: what came later is not there.
	Last time.Time `json:"last,omitzero"`
}

// use is a connection as it is known up to a line.
type use struct {
	Line
	until time.Time // not in the log any more since: an agent began, and did not list it
}

// key tells a connection from others.
type key struct {
	node            string
	id              uint32
	pod, to         netip.Addr
	podPort, toPort uint16
	protocol        string
}

func keyOf(l *Line) key {
	return key{l.Node, l.ID, l.PodIP, l.DestinationIP, l.PodPort, l.DestinationPort, l.Protocol}
}

// search is a Search that goes on.
type search struct {
	q      Question
	uses   []*use
	open   map[key]*use
	first  time.Time            // of the first line
	last   time.Time            // of the last one
	stops  map[string]time.Time // when the log of a node was last written to, where it ended
	unread int
	gaps   []string
	losses []string
	policy map[string]bool // what of the connections the log does not have
}

// Search reads logs in their order, each from its beginning, and says who had the port. It ends early with ctx; the
// Answer says so. The error is that of a reader.
func Search(ctx context.Context, q Question, logs ...io.Reader) (Answer, error) {
	s := &search{q: q, open: map[key]*use{}, stops: map[string]time.Time{}, policy: map[string]bool{}}
	for _, r := range logs {
		if err := s.read(ctx, r); err != nil {
			return s.result(ctx), err
		}
	}
	return s.result(ctx), nil
}

func (s *search) read(ctx context.Context, r io.Reader) error {
	in := bufio.NewReaderSize(r, maxLine)
	port := []byte(strconv.Itoa(int(s.q.Port)))
	var line []byte
	for n, long := 0, false; ; n++ {
		b, err := in.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			long = true
			continue
		case errors.Is(err, io.EOF):
			if line != nil {
				s.noteLast(line)
			}
			return nil // what has no end yet is being written
		case err != nil:
			return fmt.Errorf("reading a log of connections: %w", err)
		case long:
			long = false
			s.unread++
			continue
		}
		if n%4096 == 0 && ctx.Err() != nil {
			return nil
		}
		line = append(line[:0], b...)
		if s.first.IsZero() || bytes.Contains(b, port) || bytes.Contains(b, []byte(`"lost"`)) || bytes.Contains(b, []byte(`"log_st`)) {
			s.note(b)
		}
	}
}

// parse reads a line; programs that collect logs put things before it.
func parse(b []byte) (l Line, ok bool) {
	i := bytes.IndexByte(b, '{')
	if i < 0 {
		return l, false
	}
	err := json.NewDecoder(bytes.NewReader(b[i:])).Decode(&l)
	return l, err == nil && l.Event != "" && !l.Time.IsZero()
}

// noteLast notes until when the log goes.
func (s *search) noteLast(b []byte) {
	if l, ok := parse(b); ok && l.Time.After(s.last) {
		s.last = l.Time
	}
}

// note takes in a line that may be of interest.
func (s *search) note(b []byte) {
	l, ok := parse(b)
	if !ok || l.Version != Version {
		if len(bytes.TrimSpace(b)) > 0 {
			s.unread++
		}
		return
	}
	if s.first.IsZero() {
		s.first = l.Time
	}
	if l.Time.After(s.last) {
		s.last = l.Time
	}
	if l.Sample > 1 {
		s.policy[fmt.Sprintf("the log of node %s has one connection in %d", l.Node, l.Sample)] = true
	}
	switch l.Event {
	case LogStart:
		s.started(&l)
	case LogStop:
		s.stops[l.Node] = l.Time
	case Lost:
		if !l.Since.Add(-lossNear).After(s.q.To) && !l.Time.Add(lossNear).Before(s.q.From) {
			s.losses = append(s.losses, fmt.Sprintf("node %s lost %d lines from %s to %s (%s)", l.Node, l.Lost, clock(l.Since), clock(l.Time), l.Reason))
		}
	case New, Known, End:
		// The gateway's line has the overlay address, too, beside the port outside, and not the pod.
		if !s.q.Chooses(&l) {
			break
		}
		if l.EgressIP == s.q.IP && l.Port == s.q.Port || l.Port == 0 && l.OverlayIP == s.q.IP && l.OverlayPort == s.q.Port {
			s.connection(&l)
		}
	}
}

// started takes in that an agent began to write: it lists what there is. What it does not list ended while it was away,
// or before.
func (s *search) started(l *Line) {
	for k, u := range s.open {
		if k.node == l.Node && u.until.IsZero() {
			u.until = l.Time
		}
	}
	stop, known := s.stops[l.Node]
	if known && stop.Before(s.q.To) && l.Time.After(s.q.From) {
		s.gaps = append(s.gaps, fmt.Sprintf("the agent of node %s wrote nothing from %s to %s: what began and ended meanwhile is missing", l.Node, clock(stop), clock(l.Time)))
	}
	if !known && !s.first.Equal(l.Time) && l.Time.After(s.q.From) && l.Time.Add(-lossNear).Before(s.q.To) {
		s.gaps = append(s.gaps, fmt.Sprintf("the agent of node %s was killed before %s: what began and ended before that may be missing", l.Node, clock(l.Time)))
	}
	delete(s.stops, l.Node)
	if len(l.Filter) > 0 {
		s.policy[fmt.Sprintf("the log of node %s has connections of %s alone", l.Node, strings.Join(l.Filter, ", "))] = true
	}
}

// connection takes in a line of the port in question.
func (s *search) connection(l *Line) {
	k := keyOf(l)
	u := s.open[k]
	if u == nil || l.Event == New { // a new one of the same ends is another, also where the end of the former was lost
		if u != nil && u.until.IsZero() {
			u.until = l.Time
		}
		u = &use{Line: *l}
		s.open[k] = u
		s.uses = append(s.uses, u)
	}
	u.until = time.Time{}
	if l.Event == End {
		event, start, seen := u.Event, u.Start, u.Time
		was := u.Line
		u.Line = *l
		u.Event, u.Time = event, seen
		if u.Start.IsZero() {
			u.Start = start
		}
		if u.PodName == "" { // its name is known when it begins
			u.PodName, u.PodNamespace = was.PodName, was.PodNamespace
		}
		if u.Stop.IsZero() {
			u.Stop = l.Time
		}
		delete(s.open, k)
	}
	// What ended long before is of no interest, and there may be many.
	if len(s.uses) > 4*MaxUses {
		s.uses = slices.DeleteFunc(s.uses, func(u *use) bool { return !u.within(s.q) && !u.Stop.IsZero() })
	}
}

// within reports whether a connection was there at the time in question, as far as is known.
func (u *use) within(q Question) bool {
	from, to := u.Start, u.Stop
	if from.IsZero() && u.Event == New {
		from = u.Time
	}
	if to.IsZero() {
		to = u.until
	}
	return from.Before(q.To) && (to.IsZero() || to.After(q.From))
}

// result returns what was found.
func (s *search) result(ctx context.Context) Answer {
	a := Answer{Uses: []Line{}, Last: s.last}
	for _, u := range s.uses {
		if u.within(s.q) {
			a.Uses = append(a.Uses, u.Line)
		}
	}
	for _, u := range s.uses {
		if later := s.q; len(a.Uses) == 0 || a.Late {
			if later.To = later.To.Add(heardLate); u.within(later) && u.Event == New {
				a.Uses, a.Late = append(a.Uses, u.Line), true
			}
		}
	}
	if a.More = len(a.Uses) > MaxUses; a.More {
		a.Uses = a.Uses[:MaxUses]
	}
	switch {
	case s.first.IsZero():
		a.Missing = append(a.Missing, "the log is empty")
	case s.q.From.Before(s.first):
		a.Missing = append(a.Missing, "the log begins at "+clock(s.first))
	}
	if ctx.Err() != nil {
		a.Missing = append(a.Missing, "the log was not read whole: it took too long")
	}
	for node, stop := range s.stops {
		if stop.Before(s.q.To) {
			a.Missing = append(a.Missing, fmt.Sprintf("the log of node %s ends at %s", node, clock(stop)))
		}
	}
	if s.unread > 0 {
		a.Missing = append(a.Missing, fmt.Sprintf("%d lines could not be read", s.unread))
	}
	a.Missing = append(append(a.Missing, s.gaps...), s.losses...)
	for what := range s.policy {
		a.Missing = append(a.Missing, what)
	}
	slices.Sort(a.Missing)
	return a
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// SearchFile searches the log that is written to a file, and the former files of it that are there (File), as of now.
func SearchFile(ctx context.Context, q Question, name string) (Answer, error) {
	files, err := open(name)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return Answer{}, err
	}
	logs := make([]io.Reader, len(files))
	for i, f := range files {
		logs[i] = f
	}
	return Search(ctx, q, logs...)
}

// open opens a log and its former files, the oldest first. The log is opened first: what is renamed meanwhile is there
// twice, and known by that.
func open(name string) (files []*os.File, err error) {
	current, err := os.Open(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // it is between two files
		return nil, fmt.Errorf("opening the log of connections: %w", err)
	}
	defer func() {
		if err != nil && current != nil {
			current.Close()
		}
	}()
	ext := filepath.Ext(name)
	former, err := filepath.Glob(escape(strings.TrimSuffix(name, ext)) + "-*" + escape(ext))
	if err != nil {
		return nil, fmt.Errorf("looking for former files of the log of connections: %w", err)
	}
	slices.Sort(former) // by the times in their names
	for _, name := range former {
		f, err := os.Open(name)
		if errors.Is(err, fs.ErrNotExist) { // it was too old
			continue
		}
		if err != nil {
			return files, fmt.Errorf("opening the log of connections: %w", err)
		}
		if same(f, current) {
			current.Close()
			current = nil
		}
		files = append(files, f)
	}
	if current != nil {
		files = append(files, current)
	} else if again, err := os.Open(name); err == nil && !(len(files) > 0 && same(again, files[len(files)-1])) {
		files = append(files, again) // what was begun in its place
	} else if err == nil {
		again.Close()
	}
	return files, nil
}

func same(a, b *os.File) bool {
	if a == nil || b == nil {
		return false
	}
	x, err1 := a.Stat()
	y, err2 := b.Stat()
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// escape returns a pattern of filepath.Glob that means a text.
func escape(text string) string {
	return strings.NewReplacer(`\`, `\\`, `*`, `\*`, `?`, `\?`, `[`, `\[`).Replace(text)
}
