package connections

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/egret-project/egret/integration/cdf"
)

// Result is what became of one connection.
type Result struct {
	Kind        Kind
	Pod         string
	Port        uint16        // its source port in the pod; the identifier of ICMP
	Established bool          // before the fault
	Alive       bool          // what was sent at the end arrived, and a QUIC connection has kept its port
	First       time.Duration // from the fault until something arrived that was sent after it; 0: never
	// the longest time between two arrivals from the fault on; an interval, where nothing was held up
	Silence time.Duration
	Changed int    // further source ports that the server saw; those of TCP are Report.Strays
	Errors  int    // that either end got
	Error   string // the first
}

// Report is what a measurement found.
type Report struct {
	Fault    string
	From, To string        // the gateway before the fault, and after
	Took     time.Duration // the fault: until there was another owner, where there had to be one
	Results  []Result
	// Resets are the TCP segments with RST that the outside host got or sent. Strays are the source ports of segments
	// for which there was no connection, each of which it answered with one: a connection that has changed its port.
	Resets, Strays map[Kind]int
}

// Summary is what a measurement found of a kind.
type Summary struct {
	Kind                            Kind
	Connections, Established, Alive int
	Errors                          int // connections with errors
	Resets, Changed                 int
	First, Silence                  []time.Duration // of those that are alive
}

// Summaries sums the report up, for each of Kinds.
func (r *Report) Summaries() []Summary {
	var all []Summary
	for _, kind := range Kinds {
		s := Summary{Kind: kind, Resets: r.Resets[kind], Changed: r.Strays[kind]}
		for _, c := range r.Results {
			if c.Kind != kind {
				continue
			}
			s.Connections++
			s.Established += count(c.Established)
			s.Alive += count(c.Alive)
			s.Errors += count(c.Errors > 0)
			s.Changed += c.Changed
			if c.Alive {
				s.First, s.Silence = append(s.First, c.First), append(s.Silence, c.Silence)
			}
		}
		all = append(all, s)
	}
	return all
}

func count(is bool) int {
	if is {
		return 1
	}
	return 0
}

// Require is an error that names each kind of which fewer connections are alive than percent of those that there were
// to be.
func (r *Report) Require(percent float64) error {
	var errs []error
	for _, s := range r.Summaries() {
		if share := 100 * float64(s.Alive) / float64(max(s.Connections, 1)); share < percent {
			errs = append(errs, fmt.Errorf("%s: %d of %d connections are alive, %.2f %%: want %g %%", s.Kind, s.Alive, s.Connections, share, percent))
		}
	}
	return errors.Join(errs...)
}

// WriteCSV writes a header and a line per connection. The times are empty where nothing came after the fault.
func (r *Report) WriteCSV(w io.Writer) error {
	text := []byte("fault,kind,pod,port,established,alive,first_byte_ms,silence_ms,changed_ports,errors,error\n")
	for _, c := range r.Results {
		first, silence := "", ""
		if c.First > 0 {
			first, silence = fmt.Sprintf("%.1f", cdf.Milliseconds(c.First)), fmt.Sprintf("%.1f", cdf.Milliseconds(c.Silence))
		}
		text = fmt.Appendf(text, "%s,%s,%s,%d,%t,%t,%s,%s,%d,%d,%s\n", r.Fault, c.Kind, c.Pod, c.Port, c.Established, c.Alive, first, silence,
			c.Changed, c.Errors, strings.ReplaceAll(c.Error, ",", ";"))
	}
	_, err := w.Write(text)
	return err
}

// WriteTable writes a line per kind: how many connections there were, what became of them, and of those that are alive
// quantiles of the time until the first byte after the fault, and of the longest silence, in ms. Where all messages got
// lost for a while, the smallest of the former is how long that was; the others have up to an interval more.
func (r *Report) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "%s of %s, %s after it; it took %v\n", r.Fault, r.From, r.To, r.Took.Round(time.Millisecond))
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KIND\tCONNECTIONS\tESTABLISHED\tALIVE\tERRORS\tRSTS\tCHANGED PORTS\tFIRST BYTE MS MIN\tP50\tP99\tMAX\tSILENCE MS MIN\tP50\tP99\tMAX")
	for _, s := range r.Summaries() {
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%d\t%d\t%d", s.Kind, s.Connections, s.Established, s.Alive, s.Errors, s.Resets, s.Changed)
		for _, values := range [][]time.Duration{s.First, s.Silence} {
			for _, q := range []float64{1e-9, 0.5, 0.99, 1} {
				if len(values) == 0 {
					fmt.Fprint(t, "\t-")
				} else {
					fmt.Fprintf(t, "\t%.0f", cdf.Milliseconds(cdf.Quantile(values, q)))
				}
			}
		}
		fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return r.writeErrors(w)
}

// writeErrors writes how many connections had which error first.
func (r *Report) writeErrors(w io.Writer) error {
	counts := map[string]int{}
	var texts []string
	for _, c := range r.Results {
		if text := string(c.Kind) + ": " + c.Error; c.Error != "" {
			if counts[text]++; counts[text] == 1 {
				texts = append(texts, text)
			}
		}
	}
	for _, text := range texts {
		fmt.Fprintf(w, "%d times %s\n", counts[text], text)
	}
	return nil
}

// WriteSVG draws, for each kind, the share of the connections that live and had a first byte after the fault by then.
func (r *Report) WriteSVG(w io.Writer) error {
	p := cdf.Plot{Axis: "ms from the fault until something arrived that was sent after it"}
	alive := 0
	for _, s := range r.Summaries() {
		p.Curves = append(p.Curves, cdf.Curve{Name: fmt.Sprintf("%s: %d of %d alive", s.Kind, s.Alive, s.Connections), Values: s.First, Of: s.Connections})
		alive += s.Alive
	}
	p.Title = fmt.Sprintf("%s: %d of %d connections are alive", r.Fault, alive, len(r.Results))
	return cdf.WriteSVG(w, p)
}
