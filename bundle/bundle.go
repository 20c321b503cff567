package bundle

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

const (
	// Format is the number of the archive's layout: it changes when a file gets another meaning.
	Format = 1
	// DefaultTimeout is how long an archive may take in all unless Config says otherwise.
	DefaultTimeout = 2 * time.Minute

	// folder is what every name in the archive begins with.
	folder = "egret-bundle/"
	// maxFile is what one file may have: it is in memory until it is written. What is longer is cut, or, of records,
	// goes on in another file.
	maxFile = 8 << 20
	// maxTotal is what all files together may have, before compression.
	maxTotal = 256 << 20
	// maxWhole is how large all records may be for the parts that read them at once: these take some times that as
	// memory.
	maxWhole = 64 << 20
	// partTimeout is how long one part may take; a list of everything in etcd takes seconds.
	partTimeout = 30 * time.Second
)

// Config says what to collect, and from where.
type Config struct {
	Version   string   // of the program
	Endpoints []string // of etcd, for the manifest
	// Client is nil where etcd could not be reached; Unreached is why.
	Client    *store.Client
	Unreached error
	// Node: the kernel and the daemons of the node are asked, in the network namespace of the calling thread.
	Node   bool
	NodeIP netip.Addr // as for check.Run
	// Agent and Crdsync are the status addresses of the node's daemons.
	Agent, Crdsync string
	// Redact puts other names and addresses in place of those that there are, the same ones all over the archive.
	Redact  bool
	Hide    []string      // texts that never get in: passwords
	Timeout time.Duration // 0: DefaultTimeout

	chunk int // how many bytes of records a file has before another one begins; 0: half of what it may have
}

// Manifest is manifest.json, the last file of the archive.
type Manifest struct {
	Format    int       `json:"format"`
	Egret     string    `json:"egret"` // the version of the program that made it
	Made      time.Time `json:"made"`
	Host      string    `json:"host"`
	Redacted  bool      `json:"redacted"`
	Endpoints []string  `json:"endpoints"`
	Prefix    string    `json:"prefix,omitempty"`
	Files     []File    `json:"files"`
}

// File is one part of the archive, or several parts of one.
type File struct {
	Name  string `json:"name"`
	Bytes int    `json:"bytes"` // 0: there is no such file
	Took  string `json:"took"`
	// Error is why the file is not there, or not whole.
	Error string `json:"error,omitempty"`
}

// Failed returns the files that are not there, or not whole.
func (m Manifest) Failed() (out []File) {
	for _, f := range m.Files {
		if f.Error != "" {
			out = append(out, f)
		}
	}
	return out
}

// Collected reports whether there is anything beside the manifest.
func (m Manifest) Collected() bool {
	for _, f := range m.Files {
		if f.Bytes > 0 {
			return true
		}
	}
	return false
}

// Write writes the archive, a compressed tar, to w. What could not be had is in the Manifest; an error says that the
// archive could not be written, or not without names that were to be left out: then it is no archive.
func Write(ctx context.Context, cfg Config, w io.Writer) (Manifest, error) {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(cfg.Timeout, DefaultTimeout))
	defer cancel()
	host, _ := os.Hostname() // without one it is left out
	packed := gzip.NewWriter(w)
	a := &archive{tar: tar.NewWriter(packed), left: maxTotal, chunk: cmp.Or(cfg.chunk, maxFile/2), Manifest: Manifest{
		Format: Format, Egret: cfg.Version, Made: time.Now().UTC().Truncate(time.Second), Host: host, Redacted: cfg.Redact, Endpoints: plain(cfg.Endpoints),
	}}
	if cfg.Client != nil {
		a.Prefix = cfg.Client.Prefix()
	}
	clean := cleaner{hide: cfg.Hide}
	if cfg.Redact {
		r, err := newRedactor(ctx, cfg.Client, cfg.Unreached, append(a.Endpoints, host))
		if err != nil {
			return Manifest{}, err
		}
		clean.redact = r
		for i, e := range a.Endpoints {
			a.Endpoints[i] = r.text(e)
		}
		a.Host = r.text(host)
	}
	a.clean = clean
	a.etcd(ctx, cfg)
	if cfg.Node {
		a.node(ctx, cfg)
	}
	if err := a.close(); err != nil {
		return Manifest{}, err
	}
	if err := packed.Close(); err != nil {
		return Manifest{}, fmt.Errorf("writing the archive: %w", err)
	}
	return a.Manifest, nil
}

// plain returns endpoints without what names a user in a URL.
func plain(endpoints []string) []string {
	out := make([]string, len(endpoints))
	for i, e := range endpoints {
		if u, err := url.Parse(e); err == nil && u.User != nil {
			u.User = nil
			e = u.String()
		} else if _, host, ok := strings.Cut(e, "@"); ok {
			e = host
		}
		out[i] = e
	}
	return out
}

// archive is what was written so far.
type archive struct {
	Manifest
	tar   *tar.Writer
	clean cleaner
	left  int64 // of maxTotal
	bytes int   // of the records that were read
	chunk int   // as in Config
	err   error // of writing: nothing more is written then
}

// form says how a file is to be read, so that what has to be replaced in it is found.
type form int

const (
	text   form = iota
	object      // one JSON value
	lines       // a JSON value a line
)

// part has f write a file of the archive; what it wrote before an error stays. name is below the folder, and never made
// from what somebody else wrote.
func (a *archive) part(ctx context.Context, name string, as form, f func(ctx context.Context, w io.Writer) error) {
	began := time.Now()
	var out limited
	err := ctx.Err()
	if err == nil {
		partly, cancel := context.WithTimeout(ctx, partTimeout)
		err = f(partly, &out)
		cancel()
	}
	if v := (operator.Verdict{}); errors.As(err, &v) {
		err = nil // it says what is wrong with the system, which is in the file
	}
	if out.cut && err == nil {
		err = errCut
	}
	a.add(name, as, out.data.Bytes(), time.Since(began), err)
}

func (a *archive) add(name string, as form, data []byte, took time.Duration, err error) {
	data, cerr := a.clean.data(as, data)
	err = errors.Join(err, cerr)
	if int64(len(data)) > a.left {
		data, err = nil, errors.Join(err, fmt.Errorf("left out: the archive has its %d MB without it", maxTotal>>20))
	}
	f := File{Name: name, Bytes: len(data), Took: took.Round(time.Millisecond).String()}
	if err != nil {
		f.Error = a.clean.text(err.Error())
	}
	if f.Bytes > 0 || f.Error != "" {
		a.Files = append(a.Files, f)
	}
	a.left -= int64(len(data))
	if len(data) > 0 {
		a.write(name, data)
	}
}

func (a *archive) write(name string, data []byte) {
	if a.err != nil {
		return
	}
	header := tar.Header{Typeflag: tar.TypeReg, Name: folder + name, Mode: 0o600, Size: int64(len(data)), ModTime: a.Made, Format: tar.FormatUSTAR}
	if a.err = a.tar.WriteHeader(&header); a.err == nil {
		_, a.err = a.tar.Write(data)
	}
}

// close writes the manifest, and the end.
func (a *archive) close() error {
	b, err := json.MarshalIndent(a.Manifest, "", "  ")
	if err != nil {
		return err
	}
	a.write("manifest.json", append(b, '\n'))
	if err := errors.Join(a.err, a.tar.Close()); err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	return nil
}

var errCut = fmt.Errorf("cut: a file has %d MB at most", maxFile>>20)

// limited takes what fits into a file, and forgets the rest. The buffer is not embedded: io.Copy would find its
// ReadFrom, which knows no end.
type limited struct {
	data bytes.Buffer
	cut  bool
}

func (l *limited) Write(b []byte) (int, error) {
	taken := b[:min(len(b), maxFile-l.data.Len())]
	l.cut = l.cut || len(taken) < len(b)
	l.data.Write(taken)
	return len(b), nil // who writes need not know
}
