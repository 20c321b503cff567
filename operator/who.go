package operator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/natlog"
	"github.com/egret-project/egret/store"
)

// Ask asks the agent of a node at a page, such as agent.ConnectionsPage, and decodes its answer, a JSON object with the
// name of the node, into reply. The error wraps ErrNoWay where this command does not reach that agent.
type Ask func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values, reply any) error

// ErrNoWay says that this command cannot reach the agent of a node.
var ErrNoWay = errors.New("the agent of that node is not reached from here")

// errBusy is the error of an agent that answers another question, or rests after one.
var errBusy = errors.New("not now")

// WhoConfig is a question of who has, or had, a port of an egress IP.
type WhoConfig struct {
	natlog.Question
	Now bool // the time in question is now
	Ask Ask
	// Pages are where an agent is asked for its connections and for its log.
	Pages [2]string
	// Namespace is where Egret is installed, for the commands that say more.
	Namespace string
	Format    string // json, yaml, or "" for text
}

// command is the command line of the question, to be run on another node.
func (cfg WhoConfig) command() string {
	out := "egret who '" + netip.AddrPortFrom(cfg.IP, cfg.Port).String() + "'"
	if !cfg.Now {
		out += " --at " + cfg.From.UTC().Format(time.RFC3339Nano)
	}
	if cfg.Destination.IsValid() {
		out += " --to " + cfg.Destination.String()
	}
	if cfg.Protocol != "" {
		out += " --protocol '" + cfg.Protocol + "'"
	}
	return out
}

// Used is the answer: the nodes that had the port, and the connections that used it.
type Used struct {
	IP      netip.Addr    `json:"ip"`
	Port    uint16        `json:"port"`
	From    time.Time     `json:"from"`
	To      time.Time     `json:"to"`
	Holders []Holder      `json:"nodes"`
	Uses    []natlog.Line `json:"connections"`
	Late    bool          `json:"late,omitempty"`    // natlog.Answer.Late
	Missing []string      `json:"missing,omitempty"` // why something may be missing
	Ask     []string      `json:"ask,omitempty"`     // commands that say more
}

// Who writes which node had a port, and which pods used it. The error is a Verdict of status 2 when nobody had it, and
// of 1 when that could not be known.
func Who(ctx context.Context, c *store.Client, cfg WhoConfig, w io.Writer) error {
	if err := CheckReport(cfg.Format); err != nil {
		return err
	}
	holders, nodes, missing, err := whoHeld(ctx, c, cfg)
	if err != nil {
		return err
	}
	u := Used{IP: cfg.IP, Port: cfg.Port, From: cfg.From, To: cfg.To, Holders: append([]Holder{}, holders...), Uses: []natlog.Line{}, Missing: missing}
	for _, h := range holders {
		if slices.ContainsFunc(holders[:slices.Index(holders, h)], func(o Holder) bool { return o.Node == h.Node }) {
			continue
		}
		u.ask(ctx, cfg, h.Node, nodes[h.Node].Addresses)
	}
	u.askPodNodes(ctx, cfg, nodes)
	return u.answer(cfg, w)
}

// WhoInLogs writes which pods used a port, by logs alone.
func WhoInLogs(ctx context.Context, cfg WhoConfig, w io.Writer, logs ...io.Reader) error {
	if err := CheckReport(cfg.Format); err != nil {
		return err
	}
	a, err := natlog.Search(ctx, cfg.Question, logs...)
	if err != nil {
		return err
	}
	u := Used{IP: cfg.IP, Port: cfg.Port, From: cfg.From, To: cfg.To, Holders: []Holder{}, Uses: []natlog.Line{}, Missing: a.Missing}
	if !a.Last.IsZero() && a.Last.Before(cfg.To) {
		u.Missing = append(u.Missing, "the log ends at "+a.Last.UTC().Format(time.RFC3339))
	}
	u.add(cfg, a)
	for _, l := range u.Uses {
		if l.PodNode != "" {
			from := netip.AddrPortFrom(l.OverlayIP, l.OverlayPort)
			u.Missing = append(u.Missing, fmt.Sprintf("which pod of node %s it was: its log says, by egret who '%s' --log", l.PodNode, from))
		}
	}
	return u.answer(cfg, w)
}

// ask asks the agent of a node, and adds what it says; where it is not reached, how to ask it.
func (u *Used) ask(ctx context.Context, cfg WhoConfig, node string, addresses []netip.Addr) {
	pages := cfg.Pages[1:] // the log
	if cfg.Now {
		pages = cfg.Pages[:1] // the kernel, which is all that there is of now
	}
	for _, page := range pages {
		var r natlog.Reply
		err := cfg.Ask(ctx, node, addresses, page, cfg.Query(), &r)
		switch {
		case errors.Is(err, ErrNoWay):
			u.Missing = append(u.Missing, fmt.Sprintf("which pod of node %s it was: %v", node, err))
			if line := inAgent(cfg.Namespace, node, cfg.command()); line != "" {
				u.Ask = append(u.Ask, line)
			}
		case err != nil:
			u.Missing = append(u.Missing, err.Error())
		default:
			u.add(cfg, r.Answer)
			for _, m := range r.Missing {
				u.Missing = append(u.Missing, "node "+node+": "+m)
			}
		}
	}
}

// maxAsked is how many connections of other nodes' pods these nodes are asked for: each is a question of its own.
const maxAsked = 16

// askPodNodes asks the nodes of pods for which a gateway translates which pods they are: the gateway has but their
// overlay addresses and ports.
func (u *Used) askPodNodes(ctx context.Context, cfg WhoConfig, nodes map[string]egress.Node) {
	type source struct {
		node string
		netip.AddrPort
	}
	answers := map[source]Used{}
	uses := make([]natlog.Line, 0, len(u.Uses)) // an empty list, and no null, in JSON
	for i, l := range u.Uses {
		if l.PodNode == "" {
			uses = append(uses, l)
			continue
		}
		from := source{l.PodNode, netip.AddrPortFrom(l.OverlayIP, l.OverlayPort)}
		if _, asked := answers[from]; !asked && len(answers) == maxAsked {
			u.Missing = append(u.Missing, fmt.Sprintf("no more than %d pods of other nodes are asked for: --to and --protocol choose some", maxAsked))
			uses = append(uses, u.Uses[i:]...)
			break
		} else if !asked {
			of, there := cfg, Used{}
			of.IP, of.Port = l.OverlayIP, l.OverlayPort
			there.ask(ctx, of, from.node, nodes[from.node].Addresses)
			u.Missing, u.Ask = append(u.Missing, there.Missing...), append(u.Ask, there.Ask...)
			answers[from] = there
		}
		there, found := answers[from], 0
		for _, pod := range there.Uses {
			if pod.Protocol == l.Protocol && pod.DestinationIP == l.DestinationIP && pod.DestinationPort == l.DestinationPort {
				l.PodNamespace, l.PodName, l.PodIP, l.PodPort = pod.PodNamespace, pod.PodName, pod.PodIP, pod.PodPort
				uses, found = append(uses, l), found+1
			}
		}
		to := netip.AddrPortFrom(l.DestinationIP, l.DestinationPort)
		switch {
		case found == 0:
			uses = append(uses, l)
			u.Missing = append(u.Missing, fmt.Sprintf("which pod of node %s had %s toward %s", from.node, from.AddrPort, to))
		case there.Late:
			u.Late = true
		}
	}
	u.Uses = uses
	slices.SortFunc(u.Uses, natlog.Compare)
}

// named reports whether a connection says whose it is.
func named(l natlog.Line) bool { return l.PodName != "" || l.PodIP.IsValid() }

func (u *Used) add(cfg WhoConfig, a natlog.Answer) {
	for _, l := range a.Uses {
		if cfg.Chooses(&l) { // an agent of an older version does not choose
			u.Uses = append(u.Uses, l)
		}
	}
	u.Late = u.Late || a.Late && len(u.Uses) > 0
	if a.More {
		u.Missing = append(u.Missing, fmt.Sprintf("there are more than %d connections: --to and --protocol choose some", natlog.MaxUses))
	}
	slices.SortFunc(u.Uses, natlog.Compare)
}

// answer writes the answer. The error is a Verdict where no pod was found, or not that of each connection.
func (u *Used) answer(cfg WhoConfig, w io.Writer) error {
	if err := writeReport(w, cfg.Format, u, func() error { return u.text(w) }); err != nil {
		return err
	}
	all := !slices.ContainsFunc(u.Uses, func(l natlog.Line) bool { return !named(l) })
	switch {
	case len(u.Uses) > 0 && all:
		return nil
	case len(u.Missing) > 0 || !all:
		return Verdict{Status: 1, Text: fmt.Sprintf("which pod had %s could not be known", netip.AddrPortFrom(u.IP, u.Port))}
	}
	return Verdict{Status: 2, Text: fmt.Sprintf("no pod had %s", netip.AddrPortFrom(u.IP, u.Port))}
}

func (u *Used) text(w io.Writer) error {
	// Agents and others by records have chosen parts of it. What cannot be written shows in the table below, or was the
	// whole.
	out := func(format string, a ...any) { fmt.Fprintln(w, Printable(fmt.Sprintf(format, a...), longest)) }
	what := netip.AddrPortFrom(u.IP, u.Port).String()
	when := "at " + stamp(u.From)
	for _, h := range u.Holders {
		if h.Last == 0 {
			out("%s %s: node %s, between nodes, where the gateway translates", what, when, h.Node)
			continue
		}
		of := fmt.Sprintf("node %s, ports %d-%d", h.Node, h.First, h.Last)
		if h.Gateway {
			of = fmt.Sprintf("node %s, as the gateway, for nodes without ports of their own", h.Node)
		}
		until := "on"
		if !h.Until.IsZero() {
			until = "to " + stamp(h.Until)
		}
		rests := ""
		if h.Resting {
			rests = "; it rested then"
		}
		out("%s %s: %s, egress %s, from %s %s%s", what, when, of, dash(h.Egress), stamp(h.Since), until, rests)
	}
	if len(u.Holders) == 0 {
		out("%s %s", what, when)
	}
	var rows [][]string
	for _, l := range u.Uses {
		pod := l.PodNamespace + "/" + l.PodName
		if l.PodName == "" {
			pod = "-"
		}
		if l.PodNode != "" && !named(l) {
			pod = "of node " + l.PodNode + ", as " + netip.AddrPortFrom(l.OverlayIP, l.OverlayPort).String()
		}
		start, stop := "before", "-"
		if !l.Start.IsZero() {
			start = stamp(l.Start)
		} else if l.Event == natlog.Known && !l.Time.IsZero() {
			start = "before " + stamp(l.Time)
		}
		if !l.Stop.IsZero() {
			stop = stamp(l.Stop)
		}
		bytes := "-"
		if l.Traffic != nil {
			bytes = fmt.Sprintf("%d/%d", l.Traffic.SentBytes, l.Traffic.ReceivedBytes)
		}
		podIP := "-"
		if l.PodIP.IsValid() {
			podIP = netip.AddrPortFrom(l.PodIP, l.PodPort).String()
		}
		rows = append(rows, []string{pod, podIP, dash(l.Egress), l.Node, l.Protocol, netip.AddrPortFrom(l.DestinationIP, l.DestinationPort).String(), start, stop, bytes})
	}
	if len(rows) > 0 {
		if err := writeTable(w, "POD ADDRESS EGRESS NODE PROTOCOL DESTINATION BEGAN ENDED BYTES", rows); err != nil {
			return err
		}
	}
	if u.Late {
		out("these began up to half a second later, by the log, which is how late an agent may hear of a connection; nobody had the port before")
	}
	for _, m := range u.Missing {
		out("not known: %s", m)
	}
	for _, m := range u.Ask {
		out("ask there: %s", m)
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(timeFormat) }

// AskBy returns an Ask by HTTP: base returns the URL of a node's agent and the client for it; "": it cannot be reached.
func AskBy(base func(ctx context.Context, node string, addresses []netip.Addr) (string, *http.Client)) Ask {
	return func(ctx context.Context, node string, addresses []netip.Addr, page string, q url.Values, reply any) error {
		at, client := base(ctx, node, addresses)
		if at == "" {
			return ErrNoWay
		}
		ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
		defer cancel()
		of := maps.Clone(q)
		of.Set("node", node)
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, at+page+"?"+of.Encode(), nil)
		if err != nil {
			return err
		}
		resp, err := client.Do(request)
		if err != nil {
			return fmt.Errorf("asking the agent of node %s: %w", node, err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(io.LimitReader(resp.Body, 8<<20))
		text := Printable(strings.TrimSpace(string(b[:min(len(b), longest)])), longest)
		switch {
		case err != nil:
			return fmt.Errorf("reading the answer of the agent of node %s: %w", node, err)
		case resp.StatusCode == http.StatusNotFound && strings.HasPrefix(string(b), "404 "):
			return fmt.Errorf("the agent of node %s does not answer such questions: it is of an older version, or --who-clients names nobody", node)
		case resp.StatusCode == http.StatusServiceUnavailable:
			return fmt.Errorf("the agent of node %s: %w: %s", node, errBusy, text)
		case resp.StatusCode != http.StatusOK:
			return fmt.Errorf("the agent of node %s: %s", node, text)
		}
		var from struct{ Node string }
		if err := errors.Join(json.Unmarshal(b, &from), json.Unmarshal(b, reply)); err != nil {
			return fmt.Errorf("reading the answer of the agent of node %s: %w", node, err)
		}
		if from.Node != node {
			return fmt.Errorf("%w: the agent that answers is that of node %s", ErrNoWay, Printable(from.Node, 100))
		}
		return nil
	}
}
