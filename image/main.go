// Command image builds the image of Egret without Docker: its static binaries and nothing else, for one or more
// architectures, as an archive of an OCI image layout, which containerd, Docker, skopeo and crane read. It says the
// digest.
//
//	go run -C image . -version V -revision COMMIT -arch amd64,arm64 -out egret.tar
//
// The same sources, Go version, version and revision give the same bytes, wherever and whenever: no time is in it but
// -time.
package main

import (
	"archive/tar"
	"bytes"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// config is what an image is made of.
type config struct {
	source            string // the root of the repository
	version, revision string
	name              string // the tag that the archive names, registry and all
	archs             []string
	created           time.Time
}

// What is in the image, all below one folder. The first is what it runs.
var binaries = []string{"egret", "egret-etcd"}

const folder = "usr/local/bin/"

func main() {
	var c config
	var archs, out string
	var created int64
	flag.StringVar(&c.source, "source", "..", "root of the repository")
	flag.StringVar(&c.version, "version", "unknown", "version, for the binary and the label")
	flag.StringVar(&c.revision, "revision", "unknown", "commit, for the label")
	flag.StringVar(&c.name, "name", "ghcr.io/egret-project/egret:latest", "name that the archive gives the image")
	flag.StringVar(&archs, "arch", "amd64", "architectures, comma separated")
	flag.Int64Var(&created, "time", 0, "when it was created, in seconds since 1970: the commit's time")
	flag.StringVar(&out, "out", "egret.tar", "archive to write")
	flag.Parse()
	c.archs, c.created = strings.Split(archs, ","), time.Unix(created, 0).UTC()
	index, err := c.build()
	if err == nil {
		err = c.write(index, out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	digest, err := index.Digest()
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
	fmt.Println(c.name, digest)
}

// build returns the index of the images, one for each architecture.
func (c *config) build() (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, arch := range c.archs {
		image, err := c.image(arch)
		if err != nil {
			return nil, fmt.Errorf("building for %s: %w", arch, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}},
		})
	}
	return index, nil
}

func (c *config) image(arch string) (v1.Image, error) {
	programs := map[string][]byte{}
	for _, name := range binaries {
		var err error
		if programs[name], err = c.compile(name, arch); err != nil {
			return nil, err
		}
	}
	files, err := archive(programs)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(files)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err = mutate.Append(image, mutate.Addendum{
		Layer: layer, History: v1.History{CreatedBy: "image/main.go", Created: v1.Time{Time: c.created}},
	})
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created = "linux", arch, v1.Time{Time: c.created}
	file.Config = v1.Config{
		Entrypoint: []string{"/" + folder + binaries[0]}, Env: []string{"PATH=/usr/local/bin"}, User: "65532:65532", Labels: c.labels(),
	}
	return mutate.ConfigFile(image, file)
}

func (c *config) labels() map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "egret",
		"org.opencontainers.image.description": "Fixed, highly available source IPs for Kubernetes pods",
		"org.opencontainers.image.source":      "https://github.com/egret-project/egret",
		"org.opencontainers.image.version":     c.version,
		"org.opencontainers.image.revision":    c.revision,
	}
}

// compile returns a static binary. The flags are those of `make build`, so that what that has compiled is used;
// -buildvcs would put in whether the checkout is clean, which the version says already.
func (c *config) compile(name, arch string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "egret-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, name)
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-tags", "grpcnotrace", "-ldflags", "-s -w -X main.version="+c.version, "-o", out, "./cmd/"+name)
	cmd.Dir, cmd.Stderr = c.source, os.Stderr
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOWORK=off", "GOFLAGS=")
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("go build: %w", err)
	}
	return os.ReadFile(out)
}

// archive returns the one layer: the binaries in their folder, all of them root's, which the user of the image cannot
// change.
func archive(programs map[string][]byte) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, dir := range []string{"usr/", "usr/local/", folder} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	for _, name := range binaries {
		if err := w.WriteHeader(&tar.Header{Name: folder + name, Mode: 0o755, Size: int64(len(programs[name])), ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
		if _, err := w.Write(programs[name]); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return buf.Bytes(), err
}

// write writes the archive of an OCI image layout.
func (c *config) write(index v1.ImageIndex, out string) (err error) {
	dir, err := os.MkdirTemp("", "egret-image-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	// containerd names what it imports by the first, others by the second.
	names := map[string]string{"io.containerd.image.name": c.name, "org.opencontainers.image.ref.name": c.name}
	if err := path.AppendIndex(index, layout.WithAnnotations(names)); err != nil {
		return fmt.Errorf("writing the layout: %w", err)
	}
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	root := os.DirFS(dir)
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error { // in the order of the names
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(b)), ModTime: time.Unix(0, 0)}); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	for _, end := range []func() error{w.Close, f.Close} {
		if bad := end(); err == nil {
			err = bad
		}
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", out, err)
	}
	return nil
}
