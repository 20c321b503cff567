package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/egret-project/egret/natlog"
)

// NATLog says what is logged of connections, and where. The zero NATLog: nothing.
type NATLog struct {
	// File is where lines are written; StandardOutput: there. Empty: the log is off.
	File string
	// MaxSize is how large a file may become, in MB, Files how many former ones are kept, and Days for how long; 0:
	// whatever their age.
	MaxSize, Files, Days int
	// Filter are what a connection has to be of to be logged: egress=NAME, namespace=NAME or ip=ADDRESS. Of several of
	// one kind one is enough; of each kind that there is, one has to be so. What cannot be told, as of a pod whose name
	// is not known any more, is logged.
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
