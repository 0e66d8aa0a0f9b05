// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"encoding/json"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/tools/clientcmd"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/whoami"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab"
)

var screenshots = flag.String("screenshots", "", "folder for screenshots of the whoami pages (docs: for the documents)")

// screenshot describes a screenshot of a page.
type screenshot struct {
	name string // of the file
	size image.Point
	args []string // for the browser
}

// shoot takes a screenshot of a page.
func (b *browser) shoot(t *testing.T, url string, s screenshot) image.Image {
	t.Helper()
	file := filepath.Join(t.TempDir(), "page.png")
	b.open(t, url, append(s.args, fmt.Sprintf("--window-size=%d,%d", s.size.X, s.size.Y), "--screenshot="+file)...)
	if *screenshots != "" {
		root, err := lab.Root()
		if err != nil {
			t.Fatal(err)
		}
		picture, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, *screenshots, s.name+".png"), picture, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	picture, err := png.Decode(f)
	if err != nil {
		t.Fatal(err)
	}
	return picture
}

// The URLs of the page of the default site, and of one that limits what grants give.
const (
	whoamiURL       = "https://" + lab.ProxyName + "." + lab.Domain + "/whoami"
	whoamiNarrowURL = "https://" + lab.ProxyName + "." + lab.Domain + ":" + portNarrow + "/whoami"
)

// A real browser on a device of the tailnet shows its user's identity.
func TestWhoami_BrowserShowsUser(t *testing.T) {
	b := onDevice(t, "erin", "443")
	page := b.open(t, whoamiURL, "--dump-dom")
	for _, want := range []string{"You are known here", "erin@example.com", "erin.tailnet.example", "from grant 1", "from grants 1 and 2", "https://k8s.tailnet.example", "SHA-256 fingerprint"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	if t.Failed() {
		t.Log(page)
	}
	// The corner has the page's background colour, so the browser has applied the
	// page's style, both light and dark.
	for _, tt := range []struct {
		screenshot
		want color.NRGBA
	}{
		{screenshot{"whoami-light", image.Pt(900, 1690), nil}, color.NRGBA{0xf5, 0xf6, 0xf8, 0xff}},
		{screenshot{"whoami-dark", image.Pt(900, 1690), []string{"--blink-settings=preferredColorScheme=0"}}, color.NRGBA{0x11, 0x14, 0x1b, 0xff}},
		{screenshot{"whoami-phone", image.Pt(390, 2050), nil}, color.NRGBA{0xf5, 0xf6, 0xf8, 0xff}},
	} {
		picture := b.shoot(t, whoamiURL, tt.screenshot)
		for _, corner := range []image.Point{{1, 1}, {tt.size.X - 2, tt.size.Y / 2}} {
			if got := color.NRGBAModel.Convert(picture.At(corner.X, corner.Y)); got != tt.want {
				t.Errorf("%s: the page is %v at %v; want %v", tt.name, got, corner, tt.want)
			}
		}
	}
}

func TestWhoami_BrowserShowsRefusal(t *testing.T) {
	b := onDevice(t, "alice", portNarrow)
	page := b.open(t, whoamiNarrowURL, "--dump-dom")
	for _, want := range []string{"You are refused", "alice@example.com on alice.tailnet.example may not use this server", masters(), "deny_groups"} {
		if !strings.Contains(page, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	b.shoot(t, whoamiNarrowURL, screenshot{name: "whoami-refused", size: image.Pt(900, 1540)})
}

// kubectl works with the kubeconfig of the page.
func TestWhoami_KubeconfigWorks(t *testing.T) {
	resp := send(t, "bob", portDeviceLimits, get("/whoami", "Accept: application/json", "Host: k8s.tailnet.example:"+portDeviceLimits))
	var facts whoami.Facts
	if err := json.Unmarshal([]byte(resp.body), &facts); err != nil {
		t.Fatalf("%s: %v\n%s", resp.Status, err, resp.body)
	}
	if facts.User != "bob@example.com" || len(facts.Groups) != 1 || facts.Groups[0].Name != "tailnet-readers" {
		t.Errorf("got %+v", facts)
	}
	kubeconfig, text := downloadKubeconfig(t, "bob", portDeviceLimits)
	if text != facts.Kubeconfig {
		t.Errorf("the download differs from the page's kubeconfig:\n%s", text)
	}
	stdout, stderr, err := runKubectl(t, kubeconfig, nil, "get", "pods", "-o", "name")
	if err != nil || !strings.Contains(stdout, "pod/web") {
		t.Errorf("kubectl: %v: %s%s", err, stdout, stderr)
	}
}

// downloadKubeconfig returns the file with the kubeconfig that the page of a site gives to a
// caller, and its text.
func downloadKubeconfig(t *testing.T, caller, port string) (file, text string) {
	t.Helper()
	text = send(t, caller, port, get("/whoami?kubeconfig", "Host: k8s.tailnet.example:"+port)).body
	config, err := clientcmd.Load([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	// The caller is on the tailnet, but this machine is not: use the caller's SOCKS proxy.
	device, err := clientcmd.LoadFromFile(theLab.Callers[caller].Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	for _, cluster := range config.Clusters {
		cluster.ProxyURL = device.Clusters["lab"].ProxyURL
	}
	file = filepath.Join(t.TempDir(), "config")
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		t.Fatal(err)
	}
	return file, text
}
