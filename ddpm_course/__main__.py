"Runs the command line: `python -m ddpm_course`."

from ddpm_course.cli import main

if __name__ == "__main__":
    main(prog_name="ddpm_course")
