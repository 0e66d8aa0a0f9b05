// SPDX-License-Identifier: Apache-2.0

package main

import (
	"archive/tar"
	"bytes"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

// fakeCaddies returns what inspect would, of files that are no programs.
func fakeCaddies(t *testing.T, modules ...string) (caddies []caddy) {
	t.Helper()
	for _, arch := range architectures {
		path := filepath.Join(t.TempDir(), "caddy")
		if err := os.WriteFile(path, []byte("Caddy for "+arch), 0o600); err != nil {
			t.Fatal(err)
		}
		info := &debug.BuildInfo{GoVersion: "go1.26.6"}
		for _, module := range append([]string{caddyModule, pluginModule}, modules...) {
			info.Deps = append(info.Deps, &debug.Module{Path: module, Version: "v1.2.3"})
		}
		caddies = append(caddies, caddy{path: path, arch: arch, info: info, standIn: slices.Contains(modules, labModule)})
	}
	return caddies
}

// written returns the folder of an image, and the image.
func written(t *testing.T, caddies []caddy, version string) (string, v1.ImageIndex) {
	t.Helper()
	what, err := describe(caddies, version, source{revision: "abc", time: time.Unix(1700000000, 0).UTC()})
	if err != nil {
		t.Fatal(err)
	}
	index, err := assemble(caddies, what)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := write(dir, index, what); err != nil {
		t.Fatal(err)
	}
	return dir, index
}

// images returns an index's images, in the order of the index.
func images(t *testing.T, index v1.ImageIndex) (found []v1.Image) {
	t.Helper()
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, descriptor := range manifest.Manifests {
		image, err := index.Image(descriptor.Digest)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, image)
	}
	return found
}

func configOf(t *testing.T, image v1.Image) *v1.ConfigFile {
	t.Helper()
	file, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	return file
}

func TestImage_IsTheSameWhenBuiltAgain(t *testing.T) {
	caddies := fakeCaddies(t, caddyTailscaleModule)
	first, _ := written(t, caddies, "v1.2.3")
	for _, c := range caddies {
		if err := os.Chtimes(c.path, time.Now(), time.Now().Add(-time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	second, _ := written(t, caddies, "v1.2.3")
	if err := sameFiles(first, second); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(caddies[1].path, []byte("another Caddy"), 0o600); err != nil {
		t.Fatal(err)
	}
	other, _ := written(t, caddies, "v1.2.3")
	if err := sameFiles(first, other); err == nil {
		t.Error("an image with another Caddy is the same")
	}
}

func TestImage_IsValidForBothArchitectures(t *testing.T) {
	dir, index := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	fromLayout, _, err := read(filepath.Join(dir, layoutDir))
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(fromLayout); err != nil {
		t.Error(err)
	}
	var got []string
	for _, image := range images(t, index) {
		got = append(got, configOf(t, image).Platform().String())
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(got, want) {
		t.Errorf("got images for %v; want %v", got, want)
	}
}

// The tar is the layout, and nothing else.
func TestImage_TarIsTheLayout(t *testing.T) {
	dir, _ := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	file, err := os.Open(filepath.Join(dir, "caddy-tailscale-impersonate-v1.2.3-oci.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unpacked := t.TempDir()
	unpack(t, file, unpacked)
	if err := sameFiles(filepath.Join(dir, layoutDir), unpacked); err != nil {
		t.Error(err)
	}
}

// entry is what a file in an image has besides its content.
type entry struct {
	Name     string
	Mode     int64
	Uid, Gid int
}

// files returns what an image has in it.
func files(t *testing.T, image v1.Image) (found []entry) {
	t.Helper()
	content := mutate.Extract(image)
	defer content.Close()
	for r := tar.NewReader(content); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, entry{strings.TrimSuffix(header.Name, "/"), header.Mode, header.Uid, header.Gid})
	}
}

// No shell, no library, no user database: Caddy, and folders.
func TestImage_HoldsNothingButCaddy(t *testing.T) {
	want := []entry{
		{"data", 0o755, user, user},
		{"data/config", 0o755, user, user},
		{"etc", 0o755, 0, 0},
		{"etc/caddy", 0o755, 0, 0},
		{"usr", 0o755, 0, 0},
		{"usr/bin", 0o755, 0, 0},
		{"usr/bin/caddy", 0o755, 0, 0},
	}
	_, index := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	for _, image := range images(t, index) {
		if diff := cmp.Diff(want, files(t, image)); diff != "" {
			t.Errorf("the image has other files (-want +got):\n%s", diff)
		}
	}
}

func TestImage_NamesTheStandIn(t *testing.T) {
	caddies := fakeCaddies(t, labModule)
	dir, index := written(t, caddies, "")
	if _, err := os.Stat(filepath.Join(dir, "caddy-tailscale-impersonate-stand-in-oci.tar")); err != nil {
		t.Error(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	for _, labels := range []map[string]string{manifest.Annotations, configOf(t, images(t, index)[0]).Config.Labels} {
		for label, want := range map[string]string{"title": "stand-in", "description": "stand-in", "version": "stand-in", "revision": "abc", "licenses": "Apache-2.0", "created": "2023-11-14T22:13:20Z"} {
			if got := labels["org.opencontainers.image."+label]; !strings.Contains(got, want) {
				t.Errorf("label %s is %q; want %q in it", label, got, want)
			}
		}
	}
	if _, err := describe(caddies, "v1.2.3", source{}); err == nil {
		t.Error("an image with the stand-in can be called a release")
	}
	_, released := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	for label, text := range configOf(t, images(t, released)[0]).Config.Labels {
		if strings.Contains(text, "stand-in") {
			t.Errorf("label %s of a release is %q", label, text)
		}
	}
}

func TestImage_IsOfOneCaddyAndItsVersion(t *testing.T) {
	if _, err := describe(fakeCaddies(t, caddyTailscaleModule), "v1.2.4", source{}); err == nil || !strings.Contains(err.Error(), "has the plugin's v1.2.3; want v1.2.4") {
		t.Errorf("an image with another version of the plugin: got %v", err)
	}
	caddies := fakeCaddies(t, caddyTailscaleModule)
	caddies[1].info.Deps[0].Version = "v2.0.0"
	if _, err := describe(caddies, "v1.2.3", source{}); err == nil || !strings.Contains(err.Error(), "are not the same Caddy") {
		t.Errorf("an image with two versions of Caddy: got %v", err)
	}
}

func TestImage_RefusesWhatDoesNotRunInIt(t *testing.T) {
	none := filepath.Join(t.TempDir(), "caddy")
	if err := os.WriteFile(none, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	goCommand, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable() // with Caddy, through the lab
	if err != nil {
		t.Fatal(err)
	}
	other := architectures[0]
	if other == runtime.GOARCH {
		other = architectures[1]
	}
	for _, tt := range []struct{ path, arch, want string }{
		{none, runtime.GOARCH, "could not read Go build info"},
		{goCommand, runtime.GOARCH, "has no module " + caddyModule},
		{self, other, "GOARCH=" + runtime.GOARCH + "; want " + other},
	} {
		if _, err := inspect(tt.path, tt.arch); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v; want %q", tt.path, err, tt.want)
		}
	}
}

// The image, xcaddy.Dockerfile and the StatefulSet agree on paths, users and commands.
func TestImage_IsThatOfDockerfileAndManifest(t *testing.T) {
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	_, index := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	image := images(t, index)[0]
	config := configOf(t, image).Config

	text, err := os.ReadFile(filepath.Join(root, "xcaddy.Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	_, final, _ := strings.Cut(string(text), "\nFROM scratch\n")
	var instructions []string
	for line := range strings.Lines(final) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "#") {
			instructions = append(instructions, line)
		}
	}
	quoted := func(words []string) string { return `["` + strings.Join(words, `", "`) + `"]` }
	if diff := cmp.Diff([]string{
		"COPY --from=build /out/usr/bin/caddy /usr/bin/caddy",
		"COPY --from=build /out/etc/caddy /etc/caddy",
		"COPY --from=build --chown=" + config.User + " /out/data /data",
		"ENV " + strings.Join(config.Env, " "),
		"VOLUME /data",
		"USER " + config.User,
		"WORKDIR " + config.WorkingDir,
		"ENTRYPOINT " + quoted(config.Entrypoint),
		"CMD " + quoted(config.Cmd),
	}, instructions); diff != "" {
		t.Errorf("xcaddy.Dockerfile makes another image (-image +Dockerfile):\n%s", diff)
	}
	if !strings.Contains(string(text), "mkdir -p /out/etc/caddy /out/data/config\n") {
		t.Error("xcaddy.Dockerfile has other folders")
	}

	manifests, err := os.ReadFile(filepath.Join(root, "examples", "kubernetes", "20-proxy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	set := new(appsv1.StatefulSet)
	for document := range strings.SplitSeq(string(manifests), "\n---\n") {
		if strings.Contains(document, "kind: StatefulSet\n") {
			if err := yaml.UnmarshalStrict([]byte(document), set); err != nil {
				t.Fatal(err)
			}
		}
	}
	pod := set.Spec.Template.Spec
	if len(pod.Containers) != 1 {
		t.Fatalf("the StatefulSet has %d containers; want one", len(pod.Containers))
	}
	container := pod.Containers[0]
	if container.Image != imageName {
		t.Errorf("the StatefulSet has image %s; want %s", container.Image, imageName)
	}
	if len(container.Command)+len(container.Args) > 0 {
		t.Error("the StatefulSet has a command of its own")
	}
	security := pod.SecurityContext
	if got := fmt.Sprintf("%d:%d", *security.RunAsUser, *security.RunAsGroup); got != config.User || *security.FSGroup != user {
		t.Errorf("the StatefulSet runs as %s, with group %d on volumes; want %s", got, *security.FSGroup, config.User)
	}
	mounts := make(map[string]bool)
	for _, mount := range container.VolumeMounts {
		mounts[mount.MountPath] = true
	}
	for path := range config.Volumes {
		if !mounts[path] {
			t.Errorf("the StatefulSet mounts nothing at %s", path)
		}
	}
	if caddyfile := config.Cmd[slices.Index(config.Cmd, "--config")+1]; !mounts[filepath.Dir(caddyfile)] {
		t.Errorf("the StatefulSet mounts nothing at %s", filepath.Dir(caddyfile))
	}
}

func TestImage_OnlyReleasesArePushed(t *testing.T) {
	for _, module := range []string{labModule, caddyTailscaleModule} {
		dir, _ := written(t, fakeCaddies(t, module), "")
		if _, err := push(t.Context(), filepath.Join(dir, layoutDir), "registry.invalid/"+imageName); err == nil || !strings.Contains(err.Error(), "has no release") {
			t.Errorf("pushing an image with %s and without a version: got %v", module, err)
		}
	}
}

func TestImage_IsPushedAsItIs(t *testing.T) {
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer server.Close()
	address, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	dir, index := written(t, fakeCaddies(t, caddyTailscaleModule), "v1.2.3")
	repository := address.Host + "/team/" + imageName
	pushed, err := push(t.Context(), filepath.Join(dir, layoutDir), repository)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(repository + ":v1.2.3")
	if err != nil {
		t.Fatal(err)
	}
	pulled, err := remote.Index(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(pulled); err != nil {
		t.Error(err)
	}
	want, err := index.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := pulled.Digest(); err != nil || got != want || pushed != want {
		t.Errorf("pushed %v and pulled %v, %v; want %v", pushed, got, err, want)
	}
}

// built returns the folder of the image that "make image" has built, and its image for this
// machine.
func built(t *testing.T) (dir string, image v1.Image) {
	t.Helper()
	root, err := lab.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(root, "lab", ".bin", "image")
	if _, err := os.Stat(filepath.Join(dir, "digest")); errors.Is(err, fs.ErrNotExist) {
		t.Skip(`no image: run "make image" first`)
	}
	index, _, err := read(filepath.Join(dir, layoutDir))
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range images(t, index) {
		if configOf(t, image).Architecture == runtime.GOARCH {
			return dir, image
		}
	}
	t.Skipf("there is no image for %s", runtime.GOARCH)
	return "", nil
}

// unpack writes a tar's files into a folder, with their owners if it may.
func unpack(t *testing.T, from io.Reader, dir string) {
	t.Helper()
	for r := tar.NewReader(from); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, header.Name)
		switch header.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, fs.FileMode(header.Mode))
		case tar.TypeReg:
			content, readErr := io.ReadAll(r)
			err = errors.Join(readErr, os.WriteFile(path, content, fs.FileMode(header.Mode)))
		default:
			err = fmt.Errorf("%s is of type %c", header.Name, header.Typeflag)
		}
		if err == nil && os.Geteuid() == 0 {
			err = os.Lchown(path, header.Uid, header.Gid)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// container runs the image's entrypoint as a container would: as the image's user, with
// its environment, and as root of this machine with its files alone.
func container(t *testing.T, image v1.Image, rootfs string, args ...string) *exec.Cmd {
	t.Helper()
	config := configOf(t, image).Config
	cmd := exec.CommandContext(t.Context(), config.Entrypoint[0], args...)
	cmd.Env, cmd.Dir = config.Env, config.WorkingDir
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: rootfs, Credential: &syscall.Credential{Uid: user, Gid: user}}
		return cmd
	}
	cmd.Path, cmd.Dir = filepath.Join(rootfs, cmd.Path), filepath.Join(rootfs, cmd.Dir)
	cmd.Env = []string{"XDG_CONFIG_HOME=" + cmd.Dir, "XDG_DATA_HOME=" + cmd.Dir}
	return cmd
}

// rootfs unpacks an image where its user can reach it.
func rootfs(t *testing.T, image v1.Image) string {
	t.Helper()
	dir := t.TempDir()
	for parent := dir; parent != os.TempDir() && parent != "/"; parent = filepath.Dir(parent) {
		if err := os.Chmod(parent, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	content := mutate.Extract(image)
	defer content.Close()
	unpack(t, content, dir)
	return dir
}

func TestBuiltImage_HasItsModules(t *testing.T) {
	_, image := built(t)
	dir := rootfs(t, image)
	version, err := container(t, image, dir, "version").CombinedOutput()
	if err != nil || !strings.HasPrefix(string(version), "v2.") {
		t.Errorf("caddy version: %v: %s", err, version)
	}
	out, err := container(t, image, dir, "list-modules").CombinedOutput()
	if err != nil {
		t.Fatalf("caddy list-modules: %v: %s", err, out)
	}
	modules := strings.Split(string(out), "\n")
	for _, want := range []string{"tailscale", "http.handlers.tailscale_impersonate", "http.reverse_proxy.transport.kubernetes", "http.matchers.kubernetes"} {
		if !slices.Contains(modules, want) {
			t.Errorf("the image's Caddy has no module %s", want)
		}
	}
}

// The image's own command starts Caddy with what is mounted at /etc/caddy.
func TestBuiltImage_Serves(t *testing.T) {
	_, image := built(t)
	dir := rootfs(t, image)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	site := "http://" + free.Addr().String()
	free.Close()
	if err := os.WriteFile(filepath.Join(dir, "etc", "caddy", "Caddyfile"), []byte("{\n\tadmin off\n}\n"+site+" {\n\trespond hello\n}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	args := slices.Clone(configOf(t, image).Config.Cmd)
	if os.Geteuid() != 0 {
		args[2] = filepath.Join(dir, args[2])
	}
	cmd := container(t, image, dir, args...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	body, err := "", errors.New("not tried")
	for deadline := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		var resp *http.Response
		if resp, err = http.Get(site); err == nil {
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			body = string(text)
		}
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if waitErr := cmd.Wait(); waitErr != nil {
		t.Errorf("Caddy ended with %v", waitErr)
	}
	if err != nil || body != "hello" {
		t.Errorf("got %q, %v; want hello; Caddy's log:\n%s", body, err, &output)
	}
	// The configuration that Caddy autosaves: the data folder belongs to its user.
	if _, err := os.Stat(filepath.Join(dir, "data", "config", "caddy", "autosave.json")); os.Geteuid() == 0 && err != nil {
		t.Error(err)
	}
}

// The bill of materials is what `go version -m` says of the Caddy that is in the image.
func TestBuiltImage_BillOfMaterialsNamesEachModule(t *testing.T) {
	dir, image := built(t)
	boms, err := filepath.Glob(filepath.Join(dir, imageName+"-*-linux-"+runtime.GOARCH+".cdx.json"))
	if err != nil || len(boms) != 1 {
		t.Fatalf("got the bills of materials %v: %v", boms, err)
	}
	file, err := os.Open(boms[0])
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	bom := new(cyclonedx.BOM)
	if err := cyclonedx.NewBOMDecoder(file, cyclonedx.BOMFileFormatJSON).Decode(bom); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(bom.SerialNumber, "urn:uuid:") {
		t.Errorf("the bill of materials has the serial number %q, without which it is not attested", bom.SerialNumber)
	}
	listed := make(map[string]bool)
	for _, c := range *bom.Components {
		listed[c.Name] = true
		if !regexp.MustCompile(`^pkg:golang/[^@]+@[^@]+$`).MatchString(c.PackageURL) {
			t.Errorf("%s has the package URL %q", c.Name, c.PackageURL)
		}
	}
	info, err := buildinfo.ReadFile(filepath.Join(rootfs(t, image), "usr", "bin", "caddy"))
	if err != nil {
		t.Fatal(err)
	}
	if len(info.Deps) < 100 {
		t.Fatalf("Caddy has only %d modules", len(info.Deps))
	}
	for _, dep := range info.Deps {
		if !listed[dep.Path] {
			t.Errorf("the bill of materials lacks %s", dep.Path)
		}
	}
	if len(listed) != len(info.Deps)+1 {
		t.Errorf("the bill of materials has %d modules; want %d and the standard library", len(listed), len(info.Deps))
	}
}
