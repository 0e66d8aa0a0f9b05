// SPDX-License-Identifier: Apache-2.0

package node

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
)

// The images that every node has. There are no others, and no registry to get them
// from, until [Node.Import] adds some.
const (
	// Busybox is busybox with all of its commands.
	Busybox = "lab.test/busybox:1"

	pauseImage = "lab.test/pause:1"
)

// writeImages writes the node's images to a file in the format that "docker load"
// reads.
func writeImages(file string, p parts) error {
	pause, err := newPause(p.pause)
	if err != nil {
		return fmt.Errorf("image %s: %w", pauseImage, err)
	}
	busybox, err := newBusybox(p.path("bin/busybox"))
	if err != nil {
		return fmt.Errorf("image %s: %w", Busybox, err)
	}
	return WriteImages(file, map[string]v1.Image{pauseImage: pause, Busybox: busybox})
}

// WriteImages writes images to a file, which [Node.Import] reads.
func WriteImages(file string, images map[string]v1.Image) error {
	tagged := make(map[name.Tag]v1.Image, len(images))
	for ref, image := range images {
		tag, err := name.NewTag(ref)
		if err != nil {
			return err
		}
		tagged[tag] = image
	}
	return tarball.MultiWriteToFile(file, tagged)
}

// newPause returns the image of every pod's first container.
func newPause(program string) (v1.Image, error) {
	content, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	l := newLayer()
	l.file("pause", 0o755, string(content))
	return l.image(v1.Config{Entrypoint: []string{"/pause"}})
}

// newBusybox returns the image [Busybox].
func newBusybox(program string) (v1.Image, error) {
	content, err := os.ReadFile(program)
	if err != nil {
		return nil, err
	}
	commands, err := exec.Command(program, "--list-full").Output()
	if err != nil {
		return nil, err
	}
	l := newLayer()
	for _, dir := range []string{"bin", "etc", "root", "sbin", "usr", "usr/bin", "usr/sbin", "var"} {
		l.folder(dir, 0o755)
	}
	l.folder("tmp", 0o1777)
	l.file("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
	l.file("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n")
	l.file("bin/busybox", 0o755, string(content))
	for _, command := range strings.Fields(string(commands)) {
		if dir := path.Dir(command); command != "bin/busybox" && (dir == "bin" || dir == "sbin" || dir == "usr/bin" || dir == "usr/sbin") {
			l.link(command, "/bin/busybox")
		}
	}
	return l.image(v1.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}})
}

// layer is the only layer of an image.
type layer struct {
	buffer bytes.Buffer
	tar    *tar.Writer
	err    error // the first
}

func newLayer() *layer {
	l := &layer{}
	l.tar = tar.NewWriter(&l.buffer)
	return l
}

// add adds an entry.
func (l *layer) add(header tar.Header, content string) {
	header.Size = int64(len(content))
	if l.err == nil {
		l.err = l.tar.WriteHeader(&header)
	}
	if l.err == nil {
		_, l.err = io.WriteString(l.tar, content)
	}
}

func (l *layer) file(name string, mode int64, content string) {
	l.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, content)
}

func (l *layer) folder(name string, mode int64) {
	l.add(tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}, "")
}

func (l *layer) link(name, to string) {
	l.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777}, "")
}

// image returns the image with this layer.
func (l *layer) image(config v1.Config) (v1.Image, error) {
	if l.err != nil {
		return nil, l.err
	}
	if err := l.tar.Close(); err != nil {
		return nil, err
	}
	content, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(l.buffer.Bytes())), nil
	})
	if err != nil {
		return nil, err
	}
	// containerd leaves out images for other platforms.
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, Config: config})
	if err != nil {
		return nil, err
	}
	return mutate.AppendLayers(image, content)
}
