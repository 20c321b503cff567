package natlog

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
)

// gate is a writer that lets nothing through while it is shut.
type gate struct {
	mu   sync.Mutex
	open bool
	cond *sync.Cond
	got  bytes.Buffer
}

func newGate() *gate {
	g := &gate{}
	g.cond = sync.NewCond(&g.mu)
	return g
}

func (g *gate) Write(b []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for !g.open {
		g.cond.Wait()
	}
	return g.got.Write(b)
}

func (g *gate) release() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.open = true
	g.cond.Broadcast()
}

// counts are what a Writer says that it wrote and lost.
type counts struct {
	mu     sync.Mutex
	wrote  int
	missed map[Reason]int
}

func (c *counts) config(cfg Config) Config {
	c.missed = map[Reason]int{}
	cfg.Log = slog.New(slog.DiscardHandler)
	cfg.Wrote = func(n int) { c.mu.Lock(); defer c.mu.Unlock(); c.wrote += n }
	cfg.Missed = func(r Reason, n int) { c.mu.Lock(); defer c.mu.Unlock(); c.missed[r] += n }
	return cfg
}

// read returns how many connections begin in a log, and how many lines it says that were lost, by reason.
func read(t *testing.T, log []byte) (began int, lost map[Reason]int) {
	t.Helper()
	lost = map[Reason]int{}
	for l := range bytes.Lines(log) {
		var is Line
		if err := json.Unmarshal(l, &is); err != nil {
			if len(bytes.TrimSpace(l)) > 0 {
				t.Logf("torn: %q", l)
			}
			continue
		}
		switch is.Event {
		case New:
			began++
		case Lost:
			lost[is.Reason] += int(is.Lost)
			if is.Since.IsZero() || is.Node != "n1" {
				t.Errorf("%+v", is)
			}
		}
	}
	return began, lost
}

func TestAWriterThatHangsDelaysNobodyAndReportsWhatWasLost(t *testing.T) {
	g, c := newGate(), &counts{}
	w := NewWriter(c.config(Config{Out: g, Node: "n1", queue: 100_000}))
	go w.Run()
	const all = 5000
	began := time.Now()
	for range all {
		w.Write(&Line{Event: New, Time: time.Now(), Node: "n1", PodName: "web"})
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("writing took %v", took)
	}
	if w.Close(10 * time.Millisecond) {
		t.Error("all is said to be written")
	}
	g.release()
	<-w.done
	in, lost := read(t, g.got.Bytes())
	if in+lost[LostQueue] != all || in == 0 || lost[LostQueue] == 0 || c.missed[LostQueue] != lost[LostQueue] || c.wrote != bytes.Count(g.got.Bytes(), []byte("\n")) {
		t.Errorf("%d lines, %v lost, %d and %v counted; want %d in all", in, lost, c.wrote, c.missed, all)
	}
}

// TestAFullDiskLosesNoLineSilently has a file system that has room for some.
func TestAFullDiskLosesNoLineSilently(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(dir, unix.MNT_DETACH) }()
	ballast := filepath.Join(dir, "ballast")
	name, c := filepath.Join(dir, "nat.log"), &counts{}
	out := File(name, 1, 3, 0)
	w := NewWriter(c.config(Config{Out: out, Node: "n1", pause: time.Millisecond}))
	go w.Run()
	total := 0
	write := func(n int) {
		for range n {
			w.Write(&Line{Event: New, Time: time.Now(), Node: "n1", PodName: strings.Repeat("web", 10)})
			total++
		}
		eventually(t, func() bool { w.mu.Lock(); defer w.mu.Unlock(); return w.lines == 0 })
	}
	write(100)
	if err := os.WriteFile(ballast, make([]byte, 60<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		write(300) // they do not all fit
		eventually(t, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.wrote+c.missed[LostWrite] >= total })
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	write(50)
	if !w.Close(10 * time.Second) {
		t.Error("not all is written")
	}
	if err := out.Close(); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	in, lost := read(t, b)
	if in+lost[LostWrite] != total || lost[LostWrite] < 200 || lost[LostWrite] != c.missed[LostWrite] {
		t.Errorf("%d lines are in the log, which says that %v were lost, %v counted; want %d in all", in, lost, c.missed, total)
	}
}

// A disk may be full within a line, also when only its end is missing: what is in the log is what counts as written.
func TestALineThatIsCutOffIsLostOnce(t *testing.T) {
	line := []byte("{\"v\":1}\n")
	lines := bytes.Repeat(line, 2)
	for first := range len(lines) {
		for second := range len(line) + 2 { // the line, and the end of the one before
			f := &failing{takes: []int{first, second}}
			w, torn, wrote := NewWriter(Config{Out: f}), false, 0
			for _, batch := range [][]byte{lines, line, line} {
				n, _ := w.write(batch, &torn) // the error is the disk's
				wrote += n
			}
			in := 0
			for l := range bytes.Lines(f.got.Bytes()) {
				if bytes.Equal(bytes.TrimSpace(l), bytes.TrimSpace(line)) {
					in++
				}
			}
			if in != wrote {
				t.Errorf("cut after %d and %d bytes: %d lines count as written, want %d, as in %q", first, second, wrote, in, f.got.Bytes())
			}
		}
	}
}

// What a writer wrote that was killed, or had no room any more, ends within a line. The next one's first line would be
// lost with it.
func TestALogThatEndsWithinALineGoesOnWithAWholeOne(t *testing.T) {
	name := filepath.Join(t.TempDir(), "log")
	if Torn(name) {
		t.Error("a log that is not there ends within a line")
	}
	for i, was := range []string{"", `{"event":"ne`} {
		if err := os.WriteFile(name, []byte(was), 0o600); err != nil {
			t.Fatal(err)
		}
		if Torn(name) != (was != "") {
			t.Errorf("%q ends within a line: %t", was, Torn(name))
		}
		out := File(name, 1, 1, 1)
		w := NewWriter(Config{Out: out, Node: "n1", Torn: Torn(name)})
		go w.Run()
		w.Write(&Line{Event: LogStart, Time: noon, Node: "n1"})
		if !w.Close(5 * time.Second) {
			t.Fatal("not written")
		}
		out.Close()
		b, err := os.ReadFile(name)
		if lines := strings.Split(strings.TrimSpace(string(b)), "\n"); err != nil || len(lines) != i+1 || !strings.HasPrefix(lines[i], "{") || Torn(name) {
			t.Errorf("%v, %q: want the line as a whole one", err, b)
		}
	}
}

func TestALossThatCannotBeWrittenIsReportedLater(t *testing.T) {
	c := &counts{}
	out := &failing{fails: 3}
	w := NewWriter(c.config(Config{Out: out, Node: "n1", pause: time.Millisecond}))
	w.Lose(LostSocket, 500, noon)
	go w.Run()
	eventually(t, func() bool { out.mu.Lock(); defer out.mu.Unlock(); return out.got.Len() > 0 })
	if !w.Close(10 * time.Second) {
		t.Error("not all is written")
	}
	if _, lost := read(t, out.got.Bytes()); lost[LostSocket] != 500 || len(lost) != 1 || c.missed[LostSocket] != 500 {
		t.Errorf("the log says %v, counted are %v", lost, c.missed)
	}
}

// TestWhatIsQueuedIsNotWrittenOver has lines of two lengths come while others are written, now and then with a pause in
// which nothing is queued.
func TestWhatIsQueuedIsNotWrittenOver(t *testing.T) {
	c := &counts{}
	var out bytes.Buffer
	w := NewWriter(c.config(Config{Out: &out, Node: "n1"}))
	go w.Run()
	const all = 20_000
	for i := range all {
		w.Write(&Line{Event: New, Time: noon, Node: "n1", PodName: strings.Repeat("x", i%300)})
		if i%500 == 0 {
			w.wake()
			time.Sleep(time.Millisecond)
		}
	}
	if !w.Close(10 * time.Second) {
		t.Error("not all is written")
	}
	next := 0
	for l := range bytes.Lines(out.Bytes()) {
		var is Line
		if err := json.Unmarshal(l, &is); err != nil || len(is.PodName) != next%300 {
			t.Fatalf("line %d: %q, %v", next, l, err)
		}
		next++
	}
	if next != all {
		t.Errorf("%d lines, want %d", next, all)
	}
}

// failing is a writer that fails so often at first, in the middle of what it is given.
type failing struct {
	mu    sync.Mutex
	fails int   // so many writes take nothing
	takes []int // then how many bytes the next ones take at most
	got   bytes.Buffer
}

func (f *failing) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fails > 0 {
		f.fails--
		return 0, unix.ENOSPC
	}
	if len(f.takes) > 0 {
		n := f.takes[0]
		if f.takes = f.takes[1:]; n < len(b) {
			f.got.Write(b[:n])
			return n, unix.ENOSPC
		}
	}
	return f.got.Write(b)
}

// BenchmarkWrite is what a line costs who writes it.
func BenchmarkWrite(b *testing.B) {
	w := NewWriter(Config{Out: &bytes.Buffer{}, Node: "n1"})
	l := Line{Event: New, Time: noon, Node: "n1", Egress: "web", PodName: "web-1", PodNamespace: "prod", Protocol: "tcp", Port: 2048, Start: noon}
	b.ReportAllocs()
	for b.Loop() {
		if w.Write(&l); len(w.pending) > 1<<20 {
			w.pending = w.pending[:0]
		}
	}
}
