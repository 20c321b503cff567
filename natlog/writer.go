package natlog

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"gopkg.in/natefinch/lumberjack.v2"
)

const (
	// queueSize bounds what waits to be written, in bytes: a second and a half of 10,000 connections a second that
	// begin and end.
	queueSize = 16 << 20
	// chunk is how much is written at once: whole lines, so that files are rotated between them.
	chunk = 64 << 10
	// failedPause is how long nothing is written after a write that failed.
	failedPause = 500 * time.Millisecond
)

// Config says where lines go.
type Config struct {
	Out  io.Writer    // writes may take any time, and fail
	Node string       // of the lines that the Writer makes itself
	Log  *slog.Logger // of what goes wrong with writing
	Torn bool         // what is there ends within a line, as after a former writer's last write
	// Wrote and Missed count, if not nil, lines that were written, and lost. They may be called by several goroutines.
	Wrote  func(n int)
	Missed func(r Reason, n int)

	queue int           // for tests; 0: queueSize
	pause time.Duration // for tests; 0: failedPause
}

// File returns what writes to a file that is renamed, with the time, when it has megabytes, and of which so many former
// ones are kept, none for longer than days (0: whatever their age).
func File(name string, megabytes, former, days int) io.WriteCloser {
	return &lumberjack.Logger{Filename: name, MaxSize: megabytes, MaxBackups: former, MaxAge: days}
}

// Torn reports whether a file is there that ends within a line. What cannot be read is not.
func Torn(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	var last [1]byte
	end, err := f.Seek(-1, io.SeekEnd)
	if err != nil { // it is empty
		return false
	}
	_, err = f.ReadAt(last[:], end)
	return err == nil && last[0] != '\n'
}

// Writer writes lines. Write and Lose are safe for concurrent use.
type Writer struct {
	Config
	kick chan struct{} // capacity 1
	done chan struct{} // closed when Run has ended

	mu      sync.Mutex // guards what follows
	pending []byte
	lines   int // in pending
	lost    map[Reason]loss
	closed  bool
}

type loss struct {
	n     uint64
	since time.Time
}

// NewWriter returns a Writer. Nothing is written before Run.
func NewWriter(cfg Config) *Writer {
	if cfg.queue == 0 {
		cfg.queue = queueSize
	}
	if cfg.pause == 0 {
		cfg.pause = failedPause
	}
	return &Writer{Config: cfg, kick: make(chan struct{}, 1), done: make(chan struct{}), lost: map[Reason]loss{}}
}

// Write queues a line. It returns at once, also where there is no room: the line is lost then, and counted.
func (w *Writer) Write(l *Line) {
	l.Version = Version
	room := lines.Get().(*[]byte)
	b := appendLine((*room)[:0], l)
	w.mu.Lock()
	full := len(w.pending)+len(b) > w.queue || w.closed
	if !full {
		w.pending = append(w.pending, b...)
		w.lines++
	}
	w.mu.Unlock()
	*room = b
	lines.Put(room)
	if full {
		w.Lose(LostQueue, 1, l.Time)
		return
	}
	w.wake()
}

// lines are what lines are put together in.
var lines = sync.Pool{New: func() any { return new(make([]byte, 0, 1<<10)) }}

// Lose notes that n lines are missing since a time. The log says so with what is written next.
func (w *Writer) Lose(r Reason, n int, since time.Time) {
	if n <= 0 {
		return
	}
	w.mu.Lock()
	was := w.lost[r]
	if was.n == 0 {
		was.since = since
	}
	was.n += uint64(n)
	w.lost[r] = was
	w.mu.Unlock()
	if w.Missed != nil {
		w.Missed(r, n)
	}
	w.wake()
}

func (w *Writer) wake() {
	select {
	case w.kick <- struct{}{}:
	default:
	}
}

// Close has Run write what is queued, and end. It waits for that no longer than patience, and reports whether all was
// written: a write may hang.
func (w *Writer) Close(patience time.Duration) bool {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.wake()
	select {
	case <-w.done:
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.lines == 0 && len(w.lost) == 0
	case <-time.After(patience):
		return false
	}
}

// Run writes until Close.
func (w *Writer) Run() {
	defer close(w.done)
	var spare []byte
	torn, said := w.Torn, ""
	for range w.kick {
		for {
			batch, lines, losses, closed := w.take(spare)
			if len(batch) == 0 {
				spare = batch[:0] // the former one is what is queued into now
				if closed {
					return
				}
				break
			}
			wrote, err := w.write(batch, &torn)
			if w.Wrote != nil && wrote > 0 {
				w.Wrote(wrote)
			}
			if err == nil {
				if said != "" {
					w.Log.Info("the log of connections can be written to again")
				}
				said = ""
			} else {
				if err.Error() != said {
					said = err.Error()
					w.Log.Warn("the log of connections cannot be written to, lines are lost; will retry", "err", err)
				}
				if unwritten := losses[min(wrote, len(losses)):]; len(unwritten) > 0 {
					w.restore(unwritten)
					wrote = len(losses)
				}
				w.Lose(LostWrite, len(losses)+lines-wrote, time.Now())
				if closed {
					return
				}
				time.Sleep(w.pause) // lines that come meanwhile have the queue
			}
			spare = batch[:0]
			if cap(spare) > 1<<20 { // from a time when much was waiting
				spare = nil
			}
		}
	}
}

// pendingLoss is a loss of which a line is about to be written.
type pendingLoss struct {
	Reason
	loss
}

// take returns what is to be written next, and how many lines that are: first a line for each of the losses before it,
// which it returns, too.
func (w *Writer) take(spare []byte) (batch []byte, lines int, losses []pendingLoss, closed bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	batch, lines = w.pending, w.lines
	w.pending, w.lines = spare, 0
	var missing []byte
	for _, r := range Reasons {
		l := w.lost[r]
		if l.n == 0 {
			continue
		}
		missing = appendLine(missing, &Line{Version: Version, Event: Lost, Time: time.Now(), Node: w.Node, Reason: r, Lost: l.n, Since: l.since})
		losses = append(losses, pendingLoss{r, l})
		delete(w.lost, r)
	}
	if missing != nil {
		batch = append(missing, batch...)
	}
	return batch, lines, losses, w.closed
}

// restore notes losses again whose lines could not be written.
func (w *Writer) restore(losses []pendingLoss) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range losses {
		now := w.lost[l.Reason]
		w.lost[l.Reason] = loss{now.n + l.n, l.since}
	}
}

// write writes lines in chunks and returns how many were written whole. torn says that the last write ended within a
// line.
func (w *Writer) write(batch []byte, torn *bool) (wrote int, err error) {
	for len(batch) > 0 {
		n := len(batch)
		if n > chunk {
			if n = bytes.LastIndexByte(batch[:chunk], '\n') + 1; n == 0 {
				n = bytes.IndexByte(batch, '\n') + 1
			}
		}
		part := batch[:n]
		if *torn {
			part = append([]byte("\n"), part...)
		}
		did, err := w.Out.Write(part)
		did = min(max(did, 0), len(part))
		whole := bytes.Count(part[:did], []byte("\n"))
		if *torn && did > 0 {
			whole--
		}
		if did > 0 {
			*torn = part[did-1] != '\n'
		}
		if *torn && did > 0 && did < len(part) && part[did] == '\n' {
			whole++ // all of the line but its end, which the next write begins with
		}
		wrote += max(whole, 0)
		if err != nil {
			return wrote, err
		}
		batch = batch[n:]
	}
	return wrote, nil
}
