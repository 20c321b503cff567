package operator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

const (
	// mostOften is how often at most a report is made anew: a person sees two a second as live, and a large cluster
	// costs some 50 ms for each.
	mostOften = 500 * time.Millisecond
	// spaceInterval is how often etcd's members are asked how they are, of which no watch tells.
	spaceInterval = 30 * time.Second
	// settles is for how long at most the first watch may take to begin, what it follows having just been read.
	settles = 5 * time.Second
)

// Screen is where a report is written that follows etcd.
type Screen struct {
	Out io.Writer
	// Size returns how large the terminal is that Out is: a report of text is drawn over the one before there, each
	// second. nil: Out is no terminal, and a report is written whenever it has changed, by more than getting older.
	Size func() (columns, rows int)
}

// report returns what is said of etcd, with ages as of a time.
type report func(w store.Whole, tenures []egress.Tenure, space store.Space, now time.Time) (string, error)

// WatchStatus writes what Status does, again whenever it changes, until ctx ends, and then returns nil. In "json" there
// is a document at a time, in "yaml" "---" before each; text that is not for a terminal has a line with the time above,
// and an empty one below.
func WatchStatus(ctx context.Context, c *store.Client, format string, s Screen) error {
	if err := CheckReport(format); err != nil {
		return err
	}
	space, err := c.Space(ctx)
	if err != nil {
		return err
	}
	if _, err := c.ReadWhole(ctx); err != nil {
		return err
	}
	return s.follow(ctx, c, "egret status", format, &space, func(w store.Whole, _ []egress.Tenure, space store.Space, now time.Time) (string, error) {
		space.Revision = w.Revision
		var out bytes.Buffer
		err := status(w, space, now, format, &out)
		if v := (Verdict{}); errors.As(err, &v) {
			err = nil
		}
		return out.String(), err
	})
}

// WatchDescribe writes what Describe does, as WatchStatus writes it. An error says that there is no such thing when it
// is begun; of what goes later that is the report, until it comes again.
func WatchDescribe(ctx context.Context, c *store.Client, kind, name string, s Screen) error {
	if err := Describe(ctx, c, kind, name, io.Discard); err != nil {
		return err
	}
	title := "egret describe " + kind + " " + name
	return s.follow(ctx, c, title, "", nil, func(w store.Whole, tenures []egress.Tenure, _ store.Space, now time.Time) (string, error) {
		rows, err := DescribeIn(w, tenures, kind, name, now)
		if err != nil {
			return Printable(err.Error(), longest) + "\n", nil
		}
		var out bytes.Buffer
		err = writeTable(&out, "", rows)
		return out.String(), err
	})
}

// follow writes a report until ctx ends, of an etcd that was just read as a whole: one that does not answer is waited
// for, but not at the beginning. A nil space is not asked for.
func (s Screen) follow(ctx context.Context, c *store.Client, title, format string, space *store.Space, say report) error {
	stopped, stop := context.WithCancel(ctx)
	view := c.NewWholeView()
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	running.Go(func() { _ = view.Run(stopped) }) // the error is that of ctx
	spaces := make(chan store.Space)
	if space == nil {
		space = new(store.Space)
	} else {
		running.Go(func() { askSpace(stopped, c, spaces) })
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	p := painter{Screen: s, title: Printable(title, longest), format: format}
	once := false // it was followed
	for began := time.Now(); ; {
		select {
		case <-view.Changed():
		case *space = <-spaces:
		case <-tick.C:
			if !p.draws() {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		whole, tenures, ok := view.Whole()
		if !ok {
			continue
		}
		now := time.Now()
		text, err := say(whole, tenures, *space, now)
		if err != nil {
			return err
		}
		if p.draws() {
			followed := view.Healthy()
			once = once || followed
			err = p.draw(text, now, followed || !once && now.Sub(began) < settles)
		} else {
			whole.Revision = 0 // it alone is no news
			var same string
			if same, err = say(whole, tenures, *space, began); err == nil {
				err = p.print(text, same, now)
			}
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(mostOften):
		case <-ctx.Done():
		}
	}
}

// askSpace sends how etcd's members are, again and again. Where that is not known what was known last stands.
func askSpace(ctx context.Context, c *store.Client, out chan<- store.Space) {
	for {
		select {
		case <-time.After(spaceInterval):
		case <-ctx.Done():
			return
		}
		space, err := c.Space(ctx)
		if err != nil {
			continue
		}
		select {
		case out <- space:
		case <-ctx.Done():
			return
		}
	}
}

// painter writes reports to a screen.
type painter struct {
	Screen
	title  string
	format string
	last   string
	begun  bool
}

// draws reports whether a report is drawn over the one before.
func (p *painter) draws() bool { return p.Size != nil && p.format == "" }

// print writes a report, unless the same was said before.
func (p *painter) print(text, same string, now time.Time) error {
	if p.begun && same == p.last {
		return nil
	}
	p.begun, p.last = true, same
	switch p.format {
	case "":
		text = now.UTC().Format(time.RFC3339) + "\n" + text + "\n"
	case "yaml":
		text = "---\n" + text
	}
	_, err := io.WriteString(p.Out, text)
	return err
}

// draw draws a report over the one before.
func (p *painter) draw(text string, now time.Time, followed bool) error {
	columns, rows := p.Size()
	state := "live"
	if !followed {
		state = "etcd is not followed: this may be old"
	}
	head := fmt.Sprintf("%s   %s   %s\n\n", p.title, now.Format(time.DateTime), state)
	out := "\x1b[H" // to the first line
	if !p.begun {
		p.begun = true
		out = strings.Repeat("\n", rows) + out // what was there is scrolled up, not drawn over
	}
	for _, line := range fit(head+text, columns, rows-1) {
		out += line + "\x1b[K\n" // which clears the rest of the line
	}
	_, err := io.WriteString(p.Out, out+"\x1b[J") // and that what is below
	return err
}

// fit returns the lines of a text that have room on a screen, broken where they are longer than that is wide; where not
// all have, the last one says so.
func fit(text string, columns, rows int) []string {
	columns, rows = max(columns, 1), max(rows, 1)
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, " \n")
		for utf8.RuneCountInString(line) > columns {
			at := 0
			for range columns {
				_, n := utf8.DecodeRuneInString(line[at:])
				at += n
			}
			lines, line = append(lines, line[:at]), line[at:]
		}
		lines = append(lines, line)
	}
	if len(lines) <= rows {
		return lines
	}
	more := fmt.Sprintf("... and %d more lines", len(lines)-rows+1)
	return append(lines[:rows-1], more[:min(len(more), columns)])
}
