// SPDX-License-Identifier: Apache-2.0

package kubetest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/node"
)

// registry is where the tests believe that their images are from. It cannot exist, so that an
// image that is not on the node is never pulled.
const registry = "images.invalid"

// registryList replaces the registries of the tests' images.
const registryList = `promoterE2eRegistry: ` + registry + `
buildImageRegistry: ` + registry + `
invalidRegistry: ` + registry + `/no-such
gcEtcdRegistry: ` + registry + `
gcRegistry: ` + registry + `
sigStorageRegistry: ` + registry + `
privateRegistry: ` + registry + `/private
dockerLibraryRegistry: ` + registry + `
cloudProviderGcpRegistry: ` + registry + `
`

// baseNeeds are the Debian packages of which the images are made. bash is their shell: that of
// busybox drops environment variables whose names are not identifiers.
var baseNeeds = []string{"bash", "coreutils", "curl", "libc-bin", "netcat-openbsd", "busybox-static"}

// An imageSpec says what an image has.
type imageSpec struct {
	// programs are binaries of the lab, by their paths in the image.
	programs map[string]string
	// files are files of Kubernetes' module, by their paths in the image.
	files  map[string]string
	config v1.Config
}

var agnhost = map[string]string{"agnhost": "agnhost"}

// imageSpecs are the images that the lab makes, by the last part of their names. Tests that
// need another fail.
var imageSpecs = map[string]imageSpec{
	"agnhost": {
		programs: agnhost,
		files: map[string]string{
			"localhost.crt": "test/images/agnhost/porter/localhost.crt",
			"localhost.key": "test/images/agnhost/porter/localhost.key",
		},
		config: v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}},
	},
	"kitten": {
		programs: agnhost,
		files: map[string]string{
			"kitten.jpg": "test/images/kitten/html/kitten.jpg",
			"data.json":  "test/images/kitten/html/data.json",
		},
		config: v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"test-webserver"}},
	},
	"nautilus": {
		programs: agnhost,
		files: map[string]string{
			"nautilus.jpg": "test/images/nautilus/html/nautilus.jpg",
			"data.json":    "test/images/nautilus/html/data.json",
		},
		config: v1.Config{Entrypoint: []string{"/agnhost"}, Cmd: []string{"test-webserver"}},
	},
	"busybox": {config: v1.Config{Cmd: []string{"sh"}}},
	"nonroot": {config: v1.Config{User: "1234", Cmd: []string{"sh"}}},
	// Nothing asks it for a page of nginx.
	"nginx": {config: v1.Config{Cmd: []string{"/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/uploads"}}},
	"pause": {
		programs: map[string]string{"pause": "pause"},
		config:   v1.Config{Entrypoint: []string{"/pause"}},
	},
	"etcd": {
		programs: map[string]string{"usr/local/bin/etcd": "etcd"},
		config:   v1.Config{Entrypoint: []string{"/usr/local/bin/etcd"}},
	},
	"sample-apiserver": {
		programs: map[string]string{"sample-apiserver": "sample-apiserver"},
		config:   v1.Config{Entrypoint: []string{"/sample-apiserver"}},
	},
}

// WriteImages writes the images that the tests need to one file, which container runtimes can
// import, in the versions that the tests ask for. kubernetes is the folder of Kubernetes' module,
// and dir one for what this makes on the way.
func WriteImages(ctx context.Context, dir, kubernetes, file string) error {
	wanted, err := wantedImages(ctx, dir)
	if err != nil {
		return err
	}
	base, err := baseLayer(ctx, dir)
	if err != nil {
		return fmt.Errorf("the files of all images: %w", err)
	}
	images := make(map[string]v1.Image)
	programs := make(map[string]v1.Layer)
	for _, reference := range wanted {
		spec, ok := imageSpecs[path.Base(reference.Context().RepositoryStr())]
		if !ok {
			continue
		}
		image, err := spec.image(base, programs, kubernetes)
		if err != nil {
			return fmt.Errorf("image %s: %w", reference, err)
		}
		images[reference.String()] = image
	}
	for image := range imageSpecs {
		if !slices.ContainsFunc(wanted, func(tag name.Tag) bool { return path.Base(tag.RepositoryStr()) == image }) {
			return fmt.Errorf("e2e.test asks for no image %s: remove it here", image)
		}
	}
	return node.WriteImages(file, images)
}

// wantedImages returns the images that the tests ask for.
func wantedImages(ctx context.Context, dir string) ([]name.Tag, error) {
	tests, err := components.Path("e2e.test")
	if err != nil {
		return nil, err
	}
	registries := filepath.Join(dir, "registries.yaml")
	if err := os.WriteFile(registries, []byte(registryList), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, tests, "--list-images")
	cmd.Env = append(os.Environ(), "KUBE_TEST_REPO_LIST="+registries)
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("e2e.test --list-images: %w: %s", err, stderrOf(err))
	}
	var wanted []name.Tag
	for _, line := range strings.Fields(string(out)) {
		if !strings.HasPrefix(line, registry+"/") {
			continue // the tests name no registry of their own for it
		}
		tag, err := name.NewTag(line)
		if err != nil {
			return nil, fmt.Errorf("e2e.test --list-images: %w", err)
		}
		// These must not be there.
		if repository := tag.Context().RepositoryStr(); strings.HasPrefix(repository, "private/") || strings.HasPrefix(repository, "no-such/") {
			continue
		}
		wanted = append(wanted, tag)
	}
	return wanted, nil
}

// image returns the image: the files that all have, its programs, and its own files.
// programs has the layers of programs that another image has already needed.
func (s imageSpec) image(base v1.Layer, programs map[string]v1.Layer, kubernetes string) (v1.Image, error) {
	layers := []v1.Layer{base}
	for _, to := range slices.Sorted(maps.Keys(s.programs)) {
		if programs[to] == nil {
			from, err := components.Path(s.programs[to])
			if err != nil {
				return nil, err
			}
			if programs[to], err = programLayer(to, from); err != nil {
				return nil, err
			}
		}
		layers = append(layers, programs[to])
	}
	if len(s.files) > 0 {
		var own layer
		for _, to := range slices.Sorted(maps.Keys(s.files)) {
			own.addFrom(to, filepath.Join(kubernetes, filepath.FromSlash(s.files[to])), 0o644)
		}
		files, err := own.close()
		if err != nil {
			return nil, err
		}
		layers = append(layers, files)
	}
	image, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", runtime.GOARCH
	config.Config = s.config
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	return mutate.ConfigFile(image, config)
}

// programLayer returns a layer with a program.
func programLayer(to, from string) (v1.Layer, error) {
	var l layer
	l.addFrom(to, from, 0o755)
	if to == "agnhost" { // which some tests start in place of the entrypoint
		l.add(&tar.Header{Typeflag: tar.TypeSymlink, Name: "agnhost-2", Linkname: "agnhost", Mode: 0o777}, nil)
	}
	return l.close()
}

// layer is a layer of an image that is being written. It remembers the first error.
type layer struct {
	files bytes.Buffer
	w     *tar.Writer
	err   error
}

// add adds an entry. All entries have the same time, so that the same files are the same layer.
func (l *layer) add(header *tar.Header, content io.Reader) {
	if l.err != nil {
		return
	}
	if l.w == nil {
		l.w = tar.NewWriter(&l.files)
	}
	header.ModTime, header.AccessTime, header.ChangeTime = time.Unix(0, 0), time.Time{}, time.Time{}
	header.Format = tar.FormatUnknown
	if l.err = l.w.WriteHeader(header); l.err == nil && content != nil {
		_, l.err = io.Copy(l.w, content)
	}
}

// addFile adds a file.
func (l *layer) addFile(name string, content []byte, mode int64) {
	l.add(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))}, bytes.NewReader(content))
}

// addFrom adds a file of this machine.
func (l *layer) addFrom(name, from string, mode int64) {
	content, err := os.ReadFile(from)
	l.err = errors.Join(l.err, err)
	l.addFile(name, content, mode)
}

// close returns the layer. It is not compressed: it does not leave the machine.
func (l *layer) close() (v1.Layer, error) {
	if l.err == nil {
		l.err = l.w.Close()
	}
	return static.NewLayer(l.files.Bytes(), types.DockerUncompressedLayer), l.err
}
