package operator

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/egret-project/egret/store"
)

// watched are the keys by which the rows of a kind change.
var watched = map[string][]string{
	KindBlocks:    {store.BlockPrefix},
	kindMembers:   {store.MembersByEgress},
	"allocations": {store.AllocationPrefix, store.OwnerPrefix},
	"nodes":       {store.NodePrefix, store.AgentPrefix, store.OwnerPrefix, store.CordonPrefix},
	"egresses":    {store.EgressPrefix, store.OwnerPrefix},
	"moves":       {store.MovePrefix, store.OwnerPrefix, store.AgentPrefix},
	"owners":      {store.OwnerPrefix, store.EgressPrefix},
	"pools":       {store.PoolPrefix, store.AllocationPrefix, store.NodePrefix},
}

// again is after how long etcd is read again that did not answer a Watch.
const again = time.Second

// WatchConfig says what Watch writes.
type WatchConfig struct {
	Kind   string
	IP     netip.Addr   // of blocks: those of this IP alone; the zero Addr: all
	Format string       // see Check
	Events bool         // write of each record whether it was ADDED, MODIFIED or DELETED
	Log    *slog.Logger // is told when etcd does not answer meanwhile; nil: nobody is
}

// Watch writes the records of a kind, and then each that comes, changes or goes, until ctx ends, and then returns nil.
// In a table what goes is written as it was, with the word "deleted" behind. Other formats have a record at a time, as
// kubectl's --watch has them; with Events its type and the record are the fields type and object. A row without a
// record is in tables and among names alone. Records that cannot be read are left out.
func Watch(ctx context.Context, c *store.Client, cfg WatchConfig, w io.Writer) error {
	if err := Check(cfg.Kind, cfg.Format); err != nil {
		return err
	}
	prefixes := watched[cfg.Kind]
	if prefixes == nil {
		prefixes = []string{cfg.Kind + "/"}
	}
	cache := c.NewCache(prefixes...)
	watch, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- cache.Run(watch) }()
	defer func() { stop(); <-done }()
	shown := changes{cfg: cfg}
	var retry <-chan time.Time
	for {
		select {
		case <-cache.Changed():
		case <-retry:
		case <-ctx.Done():
			return nil
		}
		look, err := look(ctx, c, cfg)
		if ctx.Err() != nil {
			return nil
		}
		if retry = nil; err != nil {
			if cfg.Log != nil {
				cfg.Log.Warn("etcd does not answer, will retry", "err", err)
			}
			retry = time.After(again)
			continue
		}
		if err := shown.write(look, w); err != nil {
			return err
		}
	}
}

// look reads a kind, and returns how it is listed at a time.
func look(ctx context.Context, c *store.Client, cfg WatchConfig) (func(time.Time) listing, error) {
	if cfg.Kind == kindActs {
		acts, _, err := c.Acts(ctx)
		return func(time.Time) listing { return listActs(acts) }, err
	}
	if cfg.Kind == KindBlocks {
		blocks, _, err := readBlocks(ctx, c, cfg.IP)
		return func(now time.Time) listing { return listBlocks(blocks, now) }, err
	}
	all, err := read(ctx, c, cfg.Kind)
	return func(now time.Time) listing { return list(cfg.Kind, all, now) }, err
}

// changes are what was shown of a kind.
type changes struct {
	cfg   WatchConfig
	began time.Time // ages are of then where rows are compared: by getting older alone no row changes
	table table
	shown map[string]shownRow // by name
}

// shownRow is a row as it was shown, and its record; nil: it has none, which is so of rows of tables and of names
// alone.
type shownRow struct {
	row    []string
	record json.RawMessage
}

// inTable reports whether rows are shown, rather than records.
func (c *changes) inTable() bool { return c.cfg.Format == "" || c.cfg.Format == wide }

// rows returns the rows of a listing by name, and the names in its order.
func (c *changes) rows(l listing) (names []string, rows map[string]shownRow, err error) {
	_, all := l.columns(c.cfg.Format)
	rows = map[string]shownRow{}
	for i, row := range all {
		if i >= len(l.records) && !c.inTable() && c.cfg.Format != "name" {
			break // it is a row alone
		}
		name := l.name(row)
		r := shownRow{row: row}
		if i < len(l.records) {
			if r.record, err = json.Marshal(l.records[i]); err != nil {
				return nil, nil, err
			}
		}
		names, rows[name] = append(names, name), r
	}
	return names, rows, nil
}

// write writes what is not as it was shown.
func (c *changes) write(look func(time.Time) listing, w io.Writer) error {
	l, first := look(time.Now()), c.began.IsZero()
	header := ""
	if first {
		c.began = time.Now()
		if header, _ = l.columns(c.cfg.Format); c.cfg.Events {
			header, c.table.widths = "EVENT "+header, []int{len("MODIFIED")}
		}
	}
	_, fresh, err := c.rows(l)
	if err != nil {
		return err
	}
	names, now, err := c.rows(look(c.began))
	if err != nil {
		return err
	}
	var news [][]string
	say := func(event, name string, r shownRow) error {
		if !c.inTable() {
			return c.record(event, l.kind+"/"+name, r, w)
		}
		row := r.row
		switch {
		case c.cfg.Events:
			row = append([]string{event}, row...)
		case event == "DELETED":
			row = append(slices.Clone(row), "deleted")
		}
		news = append(news, row)
		return nil
	}
	for _, name := range names {
		event, old := "ADDED", c.shown[name]
		if old.row != nil {
			if event = "MODIFIED"; c.inTable() && slices.Equal(now[name].row, old.row) || !c.inTable() && string(now[name].record) == string(old.record) {
				continue
			}
		}
		if err := say(event, name, fresh[name]); err != nil {
			return err
		}
	}
	var gone []string
	for name := range c.shown {
		if now[name].row == nil {
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	for _, name := range gone {
		if err := say("DELETED", name, c.shown[name]); err != nil {
			return err
		}
	}
	if c.shown = now; header == "" && news == nil || !c.inTable() {
		return nil
	}
	return c.table.write(w, header, news)
}

// record writes a record in a format that is no table.
func (c *changes) record(event, name string, r shownRow, w io.Writer) error {
	if c.cfg.Format == "name" {
		return writeName(w, name)
	}
	v, err := plainly(r.record)
	if err != nil {
		return err
	}
	if c.cfg.Events {
		v = map[string]any{"type": event, "object": v}
	}
	switch template, isPath := strings.CutPrefix(c.cfg.Format, "jsonpath="); {
	case isPath:
		return writePath(w, template, v)
	case c.cfg.Format == "yaml":
		if _, err := io.WriteString(w, "---\n"); err != nil {
			return err
		}
		return writeYAML(w, v)
	}
	return writeJSON(w, v)
}
