package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/appliance"
	"github.com/keyhaven/keyhaven/appliance/fatimage"
	"github.com/keyhaven/keyhaven/internal/cli"
)

func imageCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Prepare images for devices",
	}
	cmd.AddCommand(personaliseCommand())
	return cmd
}

// personal are the flags of image personalise.
type personal struct {
	config, tokenFile, hostname, each, output string
	inPlace                                   bool
	partition                                 bool
}

func personaliseCommand() *cobra.Command {
	var p personal
	cmd := &cobra.Command{
		Use:   "personalise IMAGE",
		Short: "Write a keyhaven.yaml into an image",
		Long: `Personalise copies an image (.img or .img.xz) with your keyhaven.yaml in it, so that a device that starts from it needs nothing
else. It needs no privilege. A join token can be given apart from the file: from a file, from standard input (-), or, with
--token-file ask, from a prompt; it is not taken as an argument, since other users of this computer could read it there.

With --each every .yaml file of a directory makes an image of its own, named after it, in the directory that --output names.
--partition writes the configuration partition alone, 48 MiB, for cards that have the image already. --in-place changes an image or
a card (such as /dev/sdb, or its first partition) itself.

Who has an image with an unused token in it can enrol a device: the files that are written are readable by you alone.`,
		Example: `  keyhaven-connector image personalise --config petcam.yaml --token-file petcam.token --output petcam.img keyhaven-arm64.img.xz
  keyhaven-connector image personalise --each devices/ --output images/ keyhaven-arm64.img.xz
  keyhaven-connector image personalise --config petcam.yaml --in-place /dev/sdb`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 { // not quoted back: one may be a token
				return cli.UsageError("name one image; the token is given with --token-file, where others cannot read it")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := p.check(); err != nil {
				return err
			}
			if p.each != "" {
				return p.many(cmd, args[0])
			}
			return p.one(cmd, args[0])
		},
	}
	cmd.Flags().StringVar(&p.config, "config", "", "the keyhaven.yaml")
	cmd.Flags().StringVar(&p.tokenFile, "token-file", "", `file with the join token, readable by its owner only; "-" is standard input, "ask" a prompt (default: the token of the file)`)
	cmd.Flags().StringVar(&p.hostname, "hostname", "", "name of the device (default: that of the file)")
	cmd.Flags().StringVar(&p.each, "each", "", "directory with a keyhaven.yaml for each device, named DEVICE.yaml")
	cmd.Flags().StringVar(&p.output, "output", "", "the new image, or with --each the directory for them")
	cmd.Flags().BoolVar(&p.inPlace, "in-place", false, "change the image or card itself")
	cmd.Flags().BoolVar(&p.partition, "partition", false, "write the configuration partition alone")
	return cmd
}

func (p *personal) check() error {
	switch {
	case p.config == "" == (p.each == ""):
		return cli.UsageError("name one keyhaven.yaml by --config, or a directory of them by --each")
	case p.each != "" && (p.tokenFile != "" || p.hostname != "" || p.inPlace):
		return cli.UsageError("with --each the files say token and hostname, and --in-place cannot be: leave these flags out")
	case p.inPlace == (p.output != ""):
		return cli.UsageError("say by --output where the new image is to go, or change the one that is there by --in-place")
	case p.inPlace && p.partition:
		return cli.UsageError("--partition makes a file, --in-place makes none: leave one out")
	case strings.HasSuffix(p.output, ".xz"):
		return cli.UsageError("--output %s: the new image is not compressed; name it .img", p.output)
	}
	return nil
}

// file reads a keyhaven.yaml with what the flags add.
func (p *personal) file(cmd *cobra.Command, path string) ([]byte, error) {
	b, err := readConfig(path)
	if err != nil {
		return nil, err
	}
	add := appliance.Personal{Hostname: p.hostname}
	if p.tokenFile != "" {
		from := p.tokenFile
		if from == "ask" {
			from = ""
		}
		text, err := readToken(cmd, from)
		if err != nil {
			return nil, err
		}
		add.Token = appliance.Secret(strings.TrimSpace(text))
	}
	b, c, err := appliance.Personalised(path, b, add)
	if err != nil {
		return nil, cli.ConfigError(err)
	}
	if c.Token == "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "%s has no token: the device will wait until one is on its card\n", path)
	}
	return b, nil
}

func (p *personal) one(cmd *cobra.Command, image string) error {
	b, err := p.file(cmd, p.config)
	if err != nil {
		return err
	}
	if !p.inPlace {
		return p.write(cmd, image, p.output, b)
	}
	if strings.HasSuffix(image, ".xz") {
		return cli.UsageError("%s is compressed and cannot be changed in place; use --output", image)
	}
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return cli.ConfigError(err)
	}
	if err = keepPrivate(f); err == nil {
		err = fatimage.Personalise(f, b, time.Now())
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("%s: %w", image, err)
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s: keyhaven.yaml is written\n", image)
	return err
}

// keepPrivate takes an image away from everybody but its owner, before there is a token in it. A card's device file stays as
// the system has it.
func keepPrivate(f *os.File) error {
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o077 == 0 {
		return err
	}
	return f.Chmod(info.Mode().Perm() &^ 0o077)
}

// write makes an image.
func (p *personal) write(cmd *cobra.Command, image, output string, config []byte) (err error) {
	out, err := fatimage.Copy(image, output)
	if err != nil {
		return fmt.Errorf("%w%s", err, existsAdvice(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("%s: %w", image, err), os.Remove(output))
		}
	}()
	err = fatimage.Personalise(out, config, time.Now())
	if err == nil && p.partition {
		err = fatimage.KeepPartition(out)
	}
	if err = errors.Join(err, out.Sync(), out.Close()); err != nil {
		return err
	}
	_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is written; it holds what keyhaven.yaml says, so keep it to yourself\n", output)
	return err
}

func existsAdvice(err error) string {
	if errors.Is(err, os.ErrExist) {
		return "; remove it, or name another file"
	}
	return ""
}

// many makes an image for each file of a directory. All files are read, and must be good, before the first image is made.
func (p *personal) many(cmd *cobra.Command, image string) error {
	names, err := filepath.Glob(filepath.Join(p.each, "*.yaml"))
	if err != nil || len(names) == 0 {
		return cli.ConfigError(fmt.Errorf("--each %s: holds no .yaml files; it wants one for each device, named after it", p.each))
	}
	slices.Sort(names)
	var errs []error
	tokens := map[string]string{}
	files := make([][]byte, len(names))
	for i, name := range names {
		if files[i], err = p.file(cmd, name); err != nil {
			errs = append(errs, err)
			continue
		}
		c, err := appliance.Parse(name, files[i])
		if t := c.Token.Reveal(); err == nil && t != "" {
			if other, twice := tokens[t]; twice {
				errs = append(errs, fmt.Errorf("%s and %s have the same token, which is good for one device", other, name))
			}
			tokens[t] = name
		}
	}
	if err := errors.Join(errs...); err != nil {
		return cli.ConfigError(err)
	}
	if err := os.MkdirAll(p.output, 0o700); err != nil {
		return err
	}
	if strings.HasSuffix(strings.ToLower(image), ".xz") && len(names) > 1 { // unpacking takes longer than copying
		unpacked := filepath.Join(p.output, ".unpacked")
		f, err := fatimage.Copy(image, unpacked)
		if err != nil {
			return fmt.Errorf("%w%s", err, existsAdvice(err))
		}
		defer os.Remove(unpacked) //nolint:errcheck // it holds nothing of the devices
		if err := f.Close(); err != nil {
			return err
		}
		image = unpacked
	}
	for i, name := range names {
		to := filepath.Join(p.output, strings.TrimSuffix(filepath.Base(name), ".yaml")+".img")
		if err := p.write(cmd, image, to, files[i]); err != nil {
			return err
		}
	}
	return nil
}
